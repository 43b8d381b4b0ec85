import { describe, expect, it } from 'vitest';
import { parseIp } from '../../src/packet/addresses.ts';
import { HashType } from '../../src/virtio-net/control-wire.ts';
import { HashReport } from '../../src/virtio-net/header.ts';
import { RssHash, SUPPORTED_HASH_TYPES } from '../../src/virtio-net/toeplitz.ts';

/** "Verifying the RSS hash calculation", Microsoft: the key, and the hashes without and with ports. */
const KEY = Uint8Array.from(
  Buffer.from('6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa', 'hex'),
);
const VECTORS = [
  ['161.142.100.80', 1766, '66.9.149.187', 2794, 0x323e8fc2, 0x51ccc178],
  ['65.69.140.83', 4739, '199.92.111.2', 14230, 0xd718262a, 0xc626b0ea],
  ['12.22.207.184', 38024, '24.19.198.95', 12898, 0xd2d0a5de, 0x5c2b394a],
  ['209.142.163.6', 2217, '38.27.205.30', 48228, 0x82989176, 0xafc7327f],
  ['202.188.127.2', 1303, '153.39.163.191', 44251, 0x5d1809c5, 0x10e828a2],
  ['3ffe:2501:200:3::1', 1766, '3ffe:2501:200:1fff::7', 2794, 0x2cc18cd5, 0x40207d3d],
  ['ff02::1', 4739, '3ffe:501:8::260:97ff:fe40:efab', 14230, 0x0f0c461c, 0xdde51bbf],
  ['fe80::200:f8ff:fe21:67cf', 38024, '3ffe:1900:4545:3:200:f8ff:fe21:67cf', 44251, 0x4b61e985, 0x02d1feef],
] as const;

function frame(source: string, from: number, destination: string, to: number, protocol: number, extension = false) {
  const addresses = [parseIp(source), parseIp(destination)].map((ip) => {
    if (ip === null) throw new Error('no address');
    return [...ip];
  });
  const isIpv4 = addresses[0].length === 4;
  const ports = [from >>> 8, from & 255, to >>> 8, to & 255];
  const ip = isIpv4
    ? [0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0, ...addresses.flat()]
    : [0x60, 0, 0, 0, 0, 28, extension ? 0 : protocol, 64, ...addresses.flat()];
  if (extension) ip.push(protocol, 0, 1, 4, 0, 0, 0, 0);
  return Uint8Array.from([
    ...new Array<number>(12).fill(2),
    ...(isIpv4 ? [8, 0] : [0x86, 0xdd]),
    ...ip,
    ...ports,
    ...new Array<number>(16).fill(0),
  ]);
}

function hash(bytes: Uint8Array, types: number = SUPPORTED_HASH_TYPES, key = KEY) {
  const rss = new RssHash();
  rss.configure(types, key);
  const memory = new Uint8Array(bytes.length + 100);
  memory.set(bytes, 50);
  rss.hash(memory, 50, bytes.length);
  return { report: rss.report, value: rss.value };
}

describe('the hash of receive-side scaling', () => {
  it.each(VECTORS)(
    'is what Microsoft says for packets to %s:%i from %s:%i',
    (destination, to, source, from, plain, ports) => {
      const base = source.includes(':') ? HashReport.IPV6 : HashReport.IPV4;
      const make = (protocol: number) => frame(source, from, destination, to, protocol);
      expect(hash(make(6))).toEqual({ report: base + 1, value: ports });
      expect(hash(make(17))).toEqual({ report: base + 2, value: ports });
      expect(hash(make(1))).toEqual({ report: base, value: plain });
      expect(hash(make(6), HashType.IPV4 | HashType.IPV6)).toEqual({ report: base, value: plain });
      expect(hash(make(6), HashType.UDPV4 | HashType.UDPV6)).toEqual({ report: 0, value: 0 });
      expect(hash(make(6), HashType.TCPV4 | HashType.TCPV6)).toEqual({ report: base + 1, value: ports });
    },
  );

  it('skips extension headers, whose own types are not enabled', () => {
    const [destination, to, source, from, plain, ports] = VECTORS[5];
    const bytes = frame(source, from, destination, to, 6, true);
    expect(hash(bytes)).toEqual({ report: HashReport.TCPV6, value: ports });
    expect(hash(bytes, HashType.IPV6)).toEqual({ report: HashReport.IPV6, value: plain });
  });

  it('of a fragment is over the addresses alone', () => {
    const [destination, to, source, from, plain] = VECTORS[0];
    for (const [at, value] of [
      [20, 0x20],
      [21, 1],
    ]) {
      const bytes = frame(source, from, destination, to, 6);
      bytes[at] = value;
      expect(hash(bytes)).toEqual({ report: HashReport.IPV4, value: plain });
    }
  });

  it('is none for what is not IP or too short, and with no type enabled', () => {
    const [destination, to, source, from, plain] = VECTORS[0];
    const bytes = frame(source, from, destination, to, 6);
    expect(hash(bytes, 0)).toEqual({ report: 0, value: 0 });
    expect(hash(bytes.slice(0, 33))).toEqual({ report: 0, value: 0 });
    expect(hash(bytes.slice(0, 37))).toEqual({ report: HashReport.IPV4, value: plain });
    expect(hash(bytes.slice(0, 10))).toEqual({ report: 0, value: 0 });
    bytes[13] = 6;
    expect(hash(bytes)).toEqual({ report: 0, value: 0 });
  });

  it('finds the IP header behind a VLAN tag', () => {
    const [destination, to, source, from, , ports] = VECTORS[0];
    const bytes = frame(source, from, destination, to, 6);
    const tagged = Uint8Array.from([...bytes.subarray(0, 12), 0x81, 0, 0, 5, ...bytes.subarray(12)]);
    expect(hash(tagged)).toEqual({ report: HashReport.TCPV4, value: ports });
  });
});

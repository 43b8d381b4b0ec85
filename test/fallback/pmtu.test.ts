import { describe, expect, it } from 'vitest';
import { encapsulationOf, largestInner, writeTooBig } from '../../src/fallback/pmtu.ts';
import { addBytes, checksum, finish, ipv6PseudoSum } from '../../src/packet/checksum.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { plainMemory } from './node-engine.ts';
import {
  ahTransforms,
  concat,
  counting,
  espTransforms,
  ethernet,
  hex,
  ipv4,
  ipv6,
  makeBench,
  makeSa,
  protectOne,
  toHex,
  V4,
  V6,
} from './support.ts';

describe('the largest inner packet', () => {
  const ways = [
    { how: 'in an IPv4 tunnel', changes: { tunnel: V4 } },
    { how: 'in an IPv6 tunnel', changes: { tunnel: V6 } },
    { how: 'in UDP in an IPv4 tunnel', changes: { tunnel: V4, udpEncap: {} } },
    { how: 'in UDP in an IPv6 tunnel', changes: { tunnel: V6, udpEncap: {} } },
    { how: 'with TFC padding', changes: { tunnel: V4, tfcPadding: 37 } },
    { how: 'in transport mode over IPv4', changes: { mode: 'transport' } },
    { how: 'in transport mode over IPv6', changes: { mode: 'transport' } },
  ] as const;

  for (const { how, changes } of ways) {
    const isV6 = how.endsWith('over IPv6');
    const header = isV6 ? 40 : 20;
    const packet = (size: number): Uint8Array => (isV6 ? ipv6(counting(size - 40)) : ipv4(counting(size - 20)));
    const esp = [...espTransforms()].map(([id, algorithms]) => ({ id, algorithms: { ...algorithms, ...changes } }));
    const isEsp = 'udpEncap' in changes || 'tfcPadding' in changes;
    const ah = [...ahTransforms()].map(([id, algorithms]) => ({
      id: `AH ${id}`,
      algorithms: { ...algorithms, ...changes, protocol: 'ah' as const },
    }));

    it.each(isEsp ? esp : [...esp, ...ah])(`$id ${how} is exact: it fits, one byte more does not`, ({ algorithms }) => {
      const bench = makeBench();
      bench.ipsec.add(1, makeSa('outbound', algorithms));
      const wrong: string[] = [];
      for (const mtu of [576, 1279, 1280, 1500, 1501, 1502, 1503, 1514, 1515, 1516]) {
        const size = bench.ipsec.largestInner(1, mtu, header);
        bench.ipsec.setMtu(1, mtu);
        const fits = protectOne(bench, packet(size), 1);
        if (fits.verdict !== 'ok' || fits.bytes.length > mtu) wrong.push(`${mtu}: ${size} does not fit`);
        const more = protectOne(bench, packet(size + 1), 1);
        if (more.verdict !== 'too-big') wrong.push(`${mtu}: ${size + 1} is ${more.verdict}`);
        bench.ipsec.setMtu(1, 0);
        if (protectOne(bench, packet(size + 1), 1).bytes.length <= mtu) wrong.push(`${mtu}: ${size + 1} would fit`);
      }
      expect(wrong).toEqual([]);
    });
  }

  it('is 0 when nothing fits', () => {
    const how = encapsulationOf(makeSa('outbound'));
    expect(largestInner(how, 20 + 8 + 8 + 16 + 3)).toBe(0);
    expect(largestInner(how, 20 + 8 + 8 + 16 + 4)).toBe(2);
    expect(largestInner(how, 0)).toBe(0);
  });

  it('never makes an outer packet that 16 bits cannot describe', () => {
    const bench = makeBench(1 << 17, 2);
    for (const [handle, tunnel] of [V4, V6].entries()) {
      bench.ipsec.add(handle + 1, makeSa('outbound', { tunnel, spi: 300 + handle }));
      const size = bench.ipsec.largestInner(handle + 1, 1 << 20);
      expect(size).toBe(Math.min(65535, size));
      const largest = protectOne(bench, ipv4(counting(Math.min(size, 65535) - 20)), handle + 1);
      expect(largest.verdict).toBe('ok');
      const more = protectOne(bench, ipv6(counting(size + 1 - 40)), handle + 1);
      expect(more.verdict).toBe('too-big');
    }
  });

  it('is asked of outbound SAs: an inbound one has no MTU', () => {
    const bench = makeBench();
    bench.ipsec.add(1, makeSa('inbound'));
    expect(() => bench.ipsec.setMtu(1, 1500)).toThrow(expect.objectContaining({ code: 'SA_DIRECTION' }));
  });
});

describe('the ICMP message about a packet that is too big', () => {
  const pool = (): PacketPool => new PacketPool(plainMemory(8 * 4096), { stride: 4096 });
  const gateway4 = hex('0a0000fe');
  const gateway6 = hex('fe800000000000000000000000000001');

  it('over IPv4 names the MTU and quotes up to 576 bytes', () => {
    const p = pool();
    const packet = ipv4(counting(1400), { flags: 0x4000 });
    p.write(0, ethernet(packet));
    expect(writeTooBig(p, 1, 0, 14, 1386, gateway4)).toBe(true);
    const message = p.read(1);
    expect(toHex(message.subarray(0, 14))).toBe('0200000000010200000000020800');
    const ip = message.slice(14);
    expect(ip.length).toBe(576);
    expect((ip[2] << 8) | ip[3]).toBe(576);
    expect(checksum(ip, 0, 20)).toBe(0);
    expect(toHex(ip.subarray(12, 20))).toBe('0a0000fe0a000001');
    expect(toHex(ip.subarray(20, 22))).toBe('0304');
    expect((ip[26] << 8) | ip[27]).toBe(1386);
    expect(checksum(ip, 20, ip.length - 20)).toBe(0);
    expect(toHex(ip.subarray(28))).toBe(toHex(packet.subarray(0, 576 - 28)));
  });

  it('over IPv6 names the MTU and quotes up to 1280 bytes', () => {
    const p = pool();
    const packet = ipv6(counting(1400));
    p.write(0, packet);
    expect(writeTooBig(p, 1, 0, 0, 1366, gateway6)).toBe(true);
    const ip = p.read(1);
    expect(ip.length).toBe(1280);
    expect((ip[4] << 8) | ip[5]).toBe(1240);
    expect(ip[6]).toBe(58);
    expect(toHex(ip.subarray(8, 40))).toBe(toHex(concat(gateway6, packet.subarray(8, 24))));
    expect(toHex(ip.subarray(40, 42))).toBe('0200');
    expect(toHex(ip.subarray(44, 48))).toBe('00000556');
    expect(finish(addBytes(ip, 40, 1240, ipv6PseudoSum(ip, 0, 58, 1240)))).toBe(0);
    expect(toHex(ip.subarray(48))).toBe(toHex(packet.subarray(0, 1280 - 48)));
  });

  it.each([
    ['without DF, which the caller can fragment', ipv4(counting(1400)), gateway4],
    ['of a later fragment', ipv4(counting(1400), { flags: 0x4001 }), gateway4],
    ['that is an ICMP error', ipv4(concat(hex('0300'), counting(100)), { flags: 0x4000, protocol: 1 }), gateway4],
    ['to a multicast group', ipv4(counting(99), { flags: 0x4000, destination: hex('e0000001') }), gateway4],
    ['from nobody', ipv4(counting(99), { flags: 0x4000, source: hex('00000000') }), gateway4],
    ['that is an ICMPv6 error', ipv6(concat(hex('0100'), counting(100)), { nextHeader: 58 }), gateway6],
    ['from a multicast address', ipv6(counting(99), { source: hex('ff020000000000000000000000000001') }), gateway6],
    ['of the other family than the address', ipv6(counting(99)), gateway4],
    ['that is cut off', ipv4(counting(99), { flags: 0x4000 }).subarray(0, 19), gateway4],
  ])('is not written for a packet %s', (_, packet, source) => {
    const p = pool();
    p.write(0, packet);
    expect(writeTooBig(p, 1, 0, 0, 1300, source)).toBe(false);
    expect(p.length[1]).toBe(0);
  });

  it('answers a ping that is too big, since that is no error', () => {
    const p = pool();
    p.write(0, ipv4(concat(hex('0800'), counting(1400)), { flags: 0x4000, protocol: 1 }));
    expect(writeTooBig(p, 1, 0, 0, 1300, gateway4)).toBe(true);
  });
});

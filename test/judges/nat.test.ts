/**
 * A NAT between us and a peer in transport mode (RFC 3948, 3.1.2): the peer is Scapy, and tshark says whether the checksums of
 * what we take out are right.
 */
import { afterAll, describe, expect, it } from 'vitest';
import { formatIp } from '../../src/packet/addresses.ts';
import { addBytes, finish, ipv6PseudoSum, setIpv4Checksum } from '../../src/packet/checksum.ts';
import { realPackets, type SaText } from './matrix.ts';
import { Ours } from './ours.ts';
import { askScapy } from './scapy.ts';
import { askTshark } from './tshark.ts';

const ours = new Ours();
afterAll(() => ours[Symbol.dispose]());

/** As tshark names them. */
const Status = { bad: '0', good: '1' } as const;
const PREFERENCES = ['tcp.check_checksum:TRUE', 'udp.check_checksum:TRUE'];

const sa: SaText = {
  protocol: 'esp',
  mode: 'transport',
  spi: '0xc0ffee01',
  cipher: { name: 'aes-cbc', key: '11'.repeat(16) },
  auth: { name: 'hmac-sha256', key: '22'.repeat(32), icvLength: 16 },
  udpEncap: { sourcePort: 4500, destinationPort: 4500 },
  options: {},
  replayWindow: 64,
  initial: { sequence: '7' },
};

/** Checksum status of the TCP or UDP header of each packet. */
function statuses(packets: readonly Uint8Array[]): string[] {
  const rows = askTshark(packets, [], ['tcp.checksum.status', 'udp.checksum.status'], PREFERENCES);
  return rows.map((row) => row['tcp.checksum.status'] || row['udp.checksum.status']);
}

/** Where the addresses are, and how long: source, then destination. */
const at = (packet: Uint8Array) => (packet[0] >> 4 === 4 ? { from: 12, size: 4 } : { from: 8, size: 16 });

function withAddresses(packet: Uint8Array, first: number): Uint8Array {
  const { from, size } = at(packet);
  const out = packet.slice();
  for (let i = 0; i < 2 * size; i++) out[from + i] = i % size === 0 ? first : (packet[from + i] + first) & 0xff;
  return out;
}

/** The NAT: other addresses, and the checksums that it can see. */
function translate(packet: Uint8Array): Uint8Array {
  const out = withAddresses(packet, 0x20);
  if (out[0] >> 4 === 4) setIpv4Checksum(out, 0, 20);
  else {
    out.set([0, 0], 46);
    const length = out.length - 40;
    const check = finish(addBytes(out, 40, length, ipv6PseudoSum(out, 0, 17, length)));
    out.set([check >> 8, check & 0xff], 46);
  }
  return out;
}

const FAMILIES = [4, 6] as const;
const protocolOf = (packet: Uint8Array): number => packet[packet[0] >> 4 === 4 ? 9 : 6];

/** What is recorded of both families, as far as it is TCP or UDP with a right checksum. */
const packets = ((): Uint8Array[] => {
  const all = FAMILIES.flatMap((family) => realPackets(family, 12));
  const transports = all.filter((packet) => [6, 17].includes(protocolOf(packet)));
  const known = statuses(transports);
  return transports.filter((_, i) => known[i] === Status.good);
})();

/** The same as Scapy sends them, behind the NAT. */
const wire = askScapy(
  packets.map((packet) => ({ op: 'encrypt', sa, packet: Buffer.from(packet).toString('hex'), sequence: '7' })),
).map((answer) => {
  if (!('packet' in answer)) throw new Error(JSON.stringify(answer));
  return translate(Uint8Array.from(Buffer.from(answer.packet, 'hex')));
});

/** What we take out of it, knowing the original addresses or not. */
function opened(originals: boolean): Uint8Array[] {
  return wire.map((bytes, i) => {
    const { from, size } = at(packets[i]);
    const address = (offset: number) => formatIp(packets[i].slice(offset, offset + size));
    const original = originals ? { originalSource: address(from), originalDestination: address(from + size) } : {};
    return ours.unprotect({ ...sa, udpEncap: { sourcePort: 4500, destinationPort: 4500, ...original } }, bytes);
  });
}

describe('Scapy behind a NAT', () => {
  it('sends TCP and UDP of both families', () => {
    const kinds = new Set(packets.map((packet) => `${packet[0] >> 4}: ${protocolOf(packet)}`));
    expect([...kinds].sort()).toEqual(['4: 17', '4: 6', '6: 17', '6: 6']);
  });

  it('is understood with right checksums, which the NAT broke, when the original addresses are known, and when not', () => {
    const taken = [opened(true), opened(false)];
    for (const one of taken) expect(one.map(({ length }) => length)).toEqual(packets.map(({ length }) => length));
    const broken = packets.map((packet) => withAddresses(packet, 0x20));
    expect(statuses([...broken, ...taken.flat()])).toEqual([
      ...packets.map(() => Status.bad),
      ...packets.map(() => Status.good),
      ...packets.map(() => Status.good),
    ]);
  });
});

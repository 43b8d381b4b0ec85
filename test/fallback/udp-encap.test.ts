import { beforeEach, describe, expect, it } from 'vitest';
import { addBytes, finish, ipv4PseudoSum, ipv6PseudoSum } from '../../src/packet/checksum.ts';
import {
  type Bench,
  concat,
  counting,
  hex,
  ipv4,
  ipv6,
  makeBench,
  makePair,
  makeSa,
  protectOne,
  toHex,
  unprotectOne,
  V4,
  V6,
} from './support.ts';

let bench: Bench;
beforeEach(() => {
  bench = makeBench();
});

function udp(sourcePort: number, destinationPort: number, data: Uint8Array): Uint8Array {
  const length = data.length + 8;
  const head = [sourcePort >>> 8, sourcePort, destinationPort >>> 8, destinationPort, length >>> 8, length, 0, 0];
  return concat(
    Uint8Array.from(head, (byte) => byte & 0xff),
    data,
  );
}

describe('ESP in UDP', () => {
  it('over IPv4 has the ports of the SA and no checksum', () => {
    const [outbound, inbound] = makePair({ udpEncap: { sourcePort: 4501, destinationPort: 4600 } });
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const input = ipv4(counting(33));
    const { bytes } = protectOne(bench, input, 1);
    expect(bytes[9]).toBe(17);
    expect(toHex(bytes.subarray(20, 24))).toBe('119511f8');
    expect((bytes[24] << 8) | bytes[25]).toBe(bytes.length - 20);
    expect(toHex(bytes.subarray(26, 28))).toBe('0000');
    expect(toHex(bytes.subarray(28, 32))).toBe('00001001');
    expect(toHex(unprotectOne(bench, bytes).bytes)).toBe(toHex(input));
  });

  it.each(['tunnel', 'transport'] as const)('over IPv6 in %s mode has a right checksum', (mode) => {
    const changes = { mode, udpEncap: {}, ...(mode === 'tunnel' ? { tunnel: V6 } : {}) } as const;
    const [outbound, inbound] = makePair(changes);
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    for (let size = 0; size < 40; size++) {
      const input = ipv6(counting(size));
      const { bytes } = protectOne(bench, input, 1);
      const length = bytes.length - 40;
      expect(bytes[6]).toBe(17);
      expect((bytes[46] << 8) | bytes[47]).not.toBe(0);
      expect(finish(addBytes(bytes, 40, length, ipv6PseudoSum(bytes, 0, 17, length)))).toBe(0);
      expect(toHex(unprotectOne(bench, bytes).bytes)).toBe(toHex(input));
    }
  });

  it('is accepted with a right checksum and refused with a wrong one', () => {
    const [outbound, inbound] = makePair({ udpEncap: {} });
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const { bytes } = protectOne(bench, ipv4(counting(33)), 1);
    const length = bytes.length - 20;
    const sum = finish(addBytes(bytes, 20, length, ipv4PseudoSum(bytes, 0, 17, length)));
    const wrong = bytes.slice();
    wrong.set([(sum ^ 1) >>> 8, sum ^ 1], 26);
    expect(unprotectOne(bench, wrong).verdict).toBe('malformed');
    const right = bytes.slice();
    right.set([sum >>> 8, sum], 26);
    expect(unprotectOne(bench, right).verdict).toBe('ok');
  });

  it('over IPv6 without a checksum is refused (RFC 8200, 8.1)', () => {
    const [outbound, inbound] = makePair({ udpEncap: {}, tunnel: V6 });
    bench.ipsec.add(1, outbound);
    bench.ipsec.add(2, inbound);
    const { bytes } = protectOne(bench, ipv4(counting(33)), 1);
    bytes.set([0, 0], 46);
    expect(unprotectOne(bench, bytes).verdict).toBe('malformed');
  });

  it('goes only to SAs with UDP encapsulation, and plain ESP only to those without', () => {
    bench.ipsec.add(1, makeSa('outbound', { udpEncap: {} }));
    bench.ipsec.add(2, makeSa('outbound', { spi: 0x2002 }));
    bench.ipsec.add(3, makeSa('inbound'));
    bench.ipsec.add(4, makeSa('inbound', { spi: 0x2002, udpEncap: {} }));
    expect(unprotectOne(bench, protectOne(bench, ipv4(counting(5)), 1).bytes).verdict).toBe('no-sa');
    expect(unprotectOne(bench, protectOne(bench, ipv4(counting(5)), 2).bytes).verdict).toBe('no-sa');
  });
});

describe('other datagrams to a port of ESP', () => {
  beforeEach(() => bench.ipsec.add(3, makeSa('inbound', { udpEncap: { destinationPort: 4777 } })));
  const destination = hex('c0000202');

  it.each([
    ['a NAT keep-alive', hex('ff')],
    ['IKE behind its marker', concat(new Uint8Array(4), counting(40))],
    ['an empty datagram', new Uint8Array(0)],
    ['what is too short for ESP', counting(8)],
  ])('are left alone: %s', (_, data) => {
    for (const port of [4500, 4777]) {
      const packet = ipv4(udp(4500, port, data), { destination });
      const after = unprotectOne(bench, packet);
      expect(after.verdict).toBe('not-ipsec');
      expect(toHex(after.bytes)).toBe(toHex(packet));
    }
  });

  it('are ESP without an SA when nothing else', () => {
    expect(unprotectOne(bench, ipv4(udp(4500, 4500, counting(60)), { destination })).verdict).toBe('no-sa');
  });

  it('are not looked at on other ports, and no longer when the SA is gone', () => {
    expect(unprotectOne(bench, ipv4(udp(4500, 4778, counting(60)), { destination })).verdict).toBe('not-ipsec');
    expect(unprotectOne(bench, ipv4(udp(1, 4777, counting(60)), { destination })).verdict).toBe('no-sa');
    bench.ipsec.add(4, makeSa('inbound', { spi: 9, udpEncap: { destinationPort: 4777 } }));
    bench.ipsec.remove(3);
    expect(unprotectOne(bench, ipv4(udp(1, 4777, counting(60)), { destination })).verdict).toBe('no-sa');
    bench.ipsec.remove(4);
    expect(unprotectOne(bench, ipv4(udp(1, 4777, counting(60)), { destination })).verdict).toBe('not-ipsec');
  });

  it('with a length that is not theirs are malformed', () => {
    for (const change of [-1, 1, 4000]) {
      const packet = ipv4(udp(4500, 4500, counting(60)), { destination });
      const length = 68 + change;
      packet.set([length >>> 8, length & 0xff], 24);
      expect(unprotectOne(bench, packet).verdict).toBe('malformed');
    }
    const short = ipv4(udp(4500, 4500, counting(60)), { destination });
    short.set([0, 7], 24);
    expect(unprotectOne(bench, short).verdict).toBe('malformed');
  });

  it('in fragments are dropped when the ports are visible', () => {
    const first = ipv4(udp(4500, 4500, counting(60)), { destination, flags: 0x2000 });
    expect(unprotectOne(bench, first).verdict).toBe('fragment');
    const later = ipv4(udp(4500, 4500, counting(60)), { destination, flags: 0x0003 });
    expect(unprotectOne(bench, later).verdict).toBe('not-ipsec');
  });
});

it('UDP encapsulation works in the tunnels of both families', () => {
  for (const tunnel of [V4, V6]) {
    const both = makeBench();
    const [outbound, inbound] = makePair({ udpEncap: {}, tunnel });
    both.ipsec.add(1, outbound);
    both.ipsec.add(2, inbound);
    for (const packet of [ipv4(counting(77)), ipv6(counting(78))]) {
      expect(toHex(unprotectOne(both, protectOne(both, packet, 1).bytes).bytes)).toBe(toHex(packet));
    }
  }
});

import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { IpsecError } from '../../src/errors.ts';
import { validateSa } from '../../src/ipsec/validate.ts';
import { formatIp } from '../../src/packet/addresses.ts';
import { addBytes, finish, ipv4PseudoSum, ipv6PseudoSum } from '../../src/packet/checksum.ts';
import { concat, counting, ipv4, ipv6, makeBench, makeSa, protectOne, toHex, unprotectOne } from './support.ts';

const TCP = 6;
const UDP = 17;

/** Offset of the checksum in a TCP or UDP header. */
const field = (protocol: number): number => (protocol === TCP ? 16 : 6);

const headerOf = (packet: Uint8Array): number => (packet[0] >> 4 === 4 ? 20 : 40);

function pseudo(packet: Uint8Array, protocol: number, length: number): number {
  return packet[0] >> 4 === 4 ? ipv4PseudoSum(packet, 0, protocol, length) : ipv6PseudoSum(packet, 0, protocol, length);
}

/** 0 when the checksum is right. */
function residue(packet: Uint8Array, protocol: number): number {
  const at = headerOf(packet);
  return finish(addBytes(packet, at, packet.length - at, pseudo(packet, protocol, packet.length - at)));
}

function segment(version: 4 | 6, protocol: number, data: Uint8Array): Uint8Array {
  const header = new Uint8Array(protocol === TCP ? 20 : 8);
  header.set([0x12, 0x34, 0x00, 0x50]);
  const length = header.length + data.length;
  if (protocol === TCP) header[12] = 0x50;
  else header.set([length >> 8, length & 0xff], 4);
  const payload = concat(header, data);
  const packet = version === 4 ? ipv4(payload, { protocol }) : ipv6(payload, { nextHeader: protocol });
  const at = headerOf(packet) + field(protocol);
  const check = residue(packet, protocol) || (protocol === UDP ? 0xffff : 0);
  packet[at] = check >> 8;
  packet[at + 1] = check & 0xff;
  return packet;
}

/** What a NAT does to an IP packet with UDP over it: other addresses; over IPv6 the outer checksum follows. */
function translate(packet: Uint8Array, source: Uint8Array | null, destination: Uint8Array | null): Uint8Array {
  const out = packet.slice();
  const v4 = out[0] >> 4 === 4;
  if (source !== null) out.set(source, v4 ? 12 : 8);
  if (destination !== null) out.set(destination, v4 ? 16 : 24);
  if (v4) {
    out.set([0, 0], 10);
    const check = finish(addBytes(out, 0, 20, 0));
    out.set([check >> 8, check & 0xff], 10);
  } else {
    out.set([0, 0], 46);
    const check = residue(out, UDP);
    out.set([check >> 8, check & 0xff], 46);
  }
  return out;
}

/** Sends `packet` through ESP in UDP, transport mode, and a NAT. */
function through(
  packet: Uint8Array,
  source: Uint8Array | null,
  destination: Uint8Array | null,
  known: boolean,
): Uint8Array {
  const bench = makeBench();
  const v4 = packet[0] >> 4 === 4;
  const address = (at4: number, at6: number): string =>
    formatIp(v4 ? packet.slice(at4, at4 + 4) : packet.slice(at6, at6 + 16));
  const original = {
    ...(known && source !== null ? { originalSource: address(12, 8) } : {}),
    ...(known && destination !== null ? { originalDestination: address(16, 24) } : {}),
  };
  bench.ipsec.add(1, makeSa('outbound', { mode: 'transport', udpEncap: {} }));
  bench.ipsec.add(2, makeSa('inbound', { mode: 'transport', udpEncap: original }));
  const { verdict, bytes } = unprotectOne(bench, translate(protectOne(bench, packet, 1).bytes, source, destination));
  expect(verdict).toBe('ok');
  return bytes;
}

const addressOf = (version: 4 | 6) =>
  fc.uint8Array({ minLength: version === 4 ? 4 : 16, maxLength: version === 4 ? 4 : 16 });

describe.each([4, 6] as const)('transport mode behind a NAT, IPv%i', (version) => {
  it.each([
    ['TCP', TCP],
    ['UDP', UDP],
  ])('the checksum of %s is right for the addresses that the packet now has', (_, protocol) => {
    const address = fc.option(addressOf(version));
    fc.assert(
      fc.property(
        fc.uint8Array({ maxLength: 99 }),
        address,
        address,
        fc.boolean(),
        (data, source, destination, known) => {
          const packet = segment(version, protocol, data);
          const bytes = through(packet, source, destination, known);
          expect(residue(bytes, protocol)).toBe(0);
          expect(bytes.length).toBe(packet.length);
          const at = headerOf(packet);
          const check = at + field(protocol);
          expect(toHex(bytes.subarray(at, check))).toBe(toHex(packet.subarray(at, check)));
          expect(toHex(bytes.subarray(check + 2))).toBe(toHex(packet.subarray(check + 2)));
        },
      ),
    );
  });

  it('a checksum that was wrong before stays wrong when the original addresses are known', () => {
    const packet = segment(version, TCP, counting(40));
    packet[headerOf(packet) + 30] ^= 1;
    const source = counting(version === 4 ? 4 : 16, 77);
    expect(residue(through(packet, source, null, true), TCP)).toBe(residue(packet, TCP));
    expect(residue(through(packet, source, null, false), TCP)).toBe(0);
  });

  it.each([
    ['a UDP checksum that is absent', (p: Uint8Array, at: number) => p.set([0, 0], at + 6)],
    ['a UDP length beyond the packet', (p: Uint8Array, at: number) => p.set([0xff, 0xff], at + 4)],
    ['a UDP length below its header', (p: Uint8Array, at: number) => p.set([0, 7], at + 4)],
  ])('leaves alone %s', (_, spoil) => {
    const packet = segment(version, UDP, counting(20));
    spoil(packet, headerOf(packet));
    const at = headerOf(packet);
    const bytes = through(packet, counting(version === 4 ? 4 : 16, 5), null, true);
    expect(toHex(bytes.subarray(at))).toBe(toHex(packet.subarray(at)));
  });

  it.each([
    [TCP, 19],
    [UDP, 7],
    [132, 40],
    [6, 0],
  ])('leaves alone protocol %i with %i bytes', (protocol, length) => {
    const payload = counting(length);
    const packet = version === 4 ? ipv4(payload, { protocol }) : ipv6(payload, { nextHeader: protocol });
    const at = headerOf(packet);
    const bytes = through(packet, counting(version === 4 ? 4 : 16, 5), null, true);
    expect(toHex(bytes.subarray(at))).toBe(toHex(packet.subarray(at)));
  });
});

describe('original addresses of an SA', () => {
  const sa = (changes: object): (() => unknown) => {
    const base = {
      direction: 'inbound',
      mode: 'transport',
      spi: 1,
      aead: { name: 'aes-gcm', key: '00'.repeat(16), salt: '00000000' },
    };
    return () => validateSa({ ...base, ...changes });
  };
  const path = (action: () => unknown): unknown => {
    try {
      action();
    } catch (error) {
      if (error instanceof IpsecError) return error.path;
      throw error;
    }
    return null;
  };

  it('are two addresses of one family, of an inbound SA in transport mode', () => {
    const originalSource = '10.0.0.1';
    const tunnel = { source: '192.0.2.1', destination: '192.0.2.2' };
    expect(path(sa({ udpEncap: { originalSource } }))).toBe(null);
    expect(path(sa({ udpEncap: { originalSource, originalDestination: '10.0.0.2' } }))).toBe(null);
    expect(path(sa({ udpEncap: { originalSource, originalDestination: '::1' } }))).toBe(
      'sa.udpEncap.originalDestination',
    );
    expect(path(sa({ udpEncap: { originalSource: 'ten' } }))).toBe('sa.udpEncap.originalSource');
    expect(path(sa({ direction: 'outbound', udpEncap: { originalSource } }))).toBe('sa.udpEncap.originalSource');
    expect(path(sa({ mode: 'tunnel', tunnel, udpEncap: { originalSource } }))).toBe('sa.udpEncap.originalSource');
  });
});

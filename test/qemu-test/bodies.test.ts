/** The packets that the bodies send. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { checkAnswer, completeChecksum, datagram, indexOf, isAnswer, TOTAL } from '../../qemu-test/bodies/datagrams.ts';
import {
  hasRightChecksum,
  isIpsec,
  isUdp,
  leaveChecksum,
  turnRound,
  udpFrame,
} from '../../qemu-test/bodies/packets.ts';

import { PacketFlag, PacketPool } from '../../src/packet/pool.ts';
import { mapAnonymous } from '../../src/sys/memory.ts';

const end = (n: number) => ({ mac: Uint8Array.of(2, 0, 0, 0, 0, n), address: [192, 0, 2, n], port: 1000 * n });

describe('a datagram of the bodies', () => {
  it('has the checksums that RFC 791 and RFC 768 ask for', () => {
    const frame = udpFrame({ from: end(1), to: end(2), payload: Buffer.from('abc') });
    // Made by another program (Python, struct), with the sums of RFC 1071 written down anew.
    const header = '4500001f000000004011f6cac0000201c0000202';
    expect(frame.toString('hex', 14)).toBe(`${header}03e807d0000babb9616263`);
    expect(isUdp(frame)).toBe(true);
    expect(hasRightChecksum(frame)).toBe(true);
  });

  it('has a right checksum until any byte of it is changed', () => {
    fc.assert(
      fc.property(
        fc.uint8Array({ maxLength: 200 }),
        fc.nat(),
        fc.integer({ min: 1, max: 255 }),
        (payload, at, change) => {
          const frame = udpFrame({ from: end(1), to: end(2), payload });
          expect(hasRightChecksum(frame)).toBe(true);
          frame[42 - 8 + (at % (8 + payload.length))] ^= change;
          expect(hasRightChecksum(frame)).toBe(false);
        },
      ),
    );
  });

  it('turned round is its echo, with a right checksum; turned round twice it is itself', () => {
    const there = udpFrame({ from: end(1), to: end(2), payload: Buffer.from('echo') });
    const back = udpFrame({ from: end(2), to: end(1), payload: Buffer.from('echo') });
    const frame = Buffer.from(there);
    turnRound(frame);
    expect(frame).toEqual(back);
    turnRound(frame);
    expect(frame).toEqual(there);
  });

  it('whose checksum is left to the device has it once the rest is added up', () => {
    const whole = udpFrame({ from: end(1), to: end(2), payload: Buffer.from('left to the device') });
    const frame = Buffer.from(whole);
    const { start, offset } = leaveChecksum(frame);
    let sum = 0;
    for (let at = start; at < frame.length; at += 2) sum += frame.readUInt16BE(at);
    while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
    frame.writeUInt16BE(~sum & 0xffff, start + offset);
    expect(frame).toEqual(whole);
  });

  it('is told from ESP and AH, and bytes of any kind are looked at without harm', () => {
    const frame = udpFrame({ from: end(1), to: end(2), payload: new Uint8Array(8) });
    for (const [protocol, expected] of [
      [50, true],
      [51, true],
      [17, false],
    ] as const) {
      frame[14 + 9] = protocol;
      expect(isIpsec(frame)).toBe(expected);
    }
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 60 }), (bytes) => {
        turnRound(bytes);
        return typeof isIpsec(bytes) === 'boolean';
      }),
    );
  });
});

describe('the answer to a datagram of the flows', () => {
  const nic = { mac: end(1).mac, mtu: 1500 };
  const peer = { mac: end(2).mac, address: [192, 0, 2, 2], own: [192, 0, 2, 1] };
  /** What an echo server makes of datagram `index`. */
  const answer = (index: number): Buffer => {
    const frame = udpFrame(datagram(nic, peer, index));
    turnRound(frame);
    return frame;
  };

  it('is known by its port and its number, and is right', () => {
    for (let index = 0; index <= TOTAL; index++) {
      expect([isAnswer(answer(index)), indexOf(answer(index))]).toEqual([true, index]);
      expect(isAnswer(udpFrame(datagram(nic, peer, index)))).toBe(false);
      checkAnswer(answer(index), datagram(nic, peer, index));
    }
  });

  it('is wrong when a byte of addresses, ports, checksum or data is changed, or one is missing', () => {
    fc.assert(
      fc.property(fc.nat(TOTAL - 1), fc.nat(), fc.integer({ min: 1, max: 255 }), (index, at, change) => {
        const frame = answer(index);
        // From the IP addresses on: what is before is the server's own, but for the link header.
        const place = 26 + (at % (frame.length - 26));
        frame[place] ^= change;
        expect(() => checkAnswer(frame, datagram(nic, peer, index))).toThrow();
        expect(() => checkAnswer(answer(index).subarray(0, -1), datagram(nic, peer, index))).toThrow();
      }),
    );
  });

  it('whose checksum was left open is completed, and no other is touched', () => {
    const pool = new PacketPool(mapAnonymous(4096), { stride: 2048 });
    for (let index = 0; index < TOTAL; index++) {
      const frame = answer(index);
      const { start, offset } = leaveChecksum(frame);
      pool.checksumStart[0] = start;
      pool.checksumOffset[0] = offset;
      pool.flags[0] = 0;
      completeChecksum(pool, 0, frame);
      expect(frame.equals(answer(index))).toBe(false);
      pool.flags[0] = PacketFlag.needsChecksum;
      completeChecksum(pool, 0, frame);
      expect(frame.equals(answer(index))).toBe(true);
    }
  });
});

import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Verdict } from '../../src/fallback/verdict.ts';
import { NicRxQueue, type RxRing } from '../../src/nic/rx-queue.ts';
import { NO_PACKET, PacketFlag } from '../../src/packet/pool.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import { inbound, outbound } from '../ipsec/support.ts';
import { type TxSetup, txSetup } from './support.ts';

const LINK_HEADER = 14;
/** Bytes of a slot behind the headroom. */
const ROOM = 2048 - 128;

let setup: TxSetup;
beforeEach(() => {
  setup = txSetup({ packets: 128, references: 16, mtu: 9000 });
});
afterEach(() => setup.close());

/** An Ethernet frame with an IPv4 packet of `size` bytes of protocol `protocol`. */
function frame(size: number, protocol = 253): Buffer {
  const bytes = Buffer.alloc(LINK_HEADER + size, 0x5a);
  bytes.write('02000000000202000000000108004500000000004000400000000a0000010a000002', 'hex');
  bytes.writeUInt16BE(size, 16);
  bytes[23] = protocol;
  let sum = 0;
  for (let at = 14; at < 34; at += 2) sum += bytes.readUInt16BE(at);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  bytes.writeUInt16BE(~sum & 0xffff, 24);
  for (let i = 34; i < bytes.length; i++) bytes[i] = i;
  return bytes;
}

/** `bytes` over as many slots as `cuts` says, each piece somewhere in its slot. */
function spread(bytes: Uint8Array, cuts: readonly number[], at: number): number {
  const { pool } = setup;
  const ends = [...new Set([...cuts.map((cut) => 1 + (cut % (bytes.length - 1))), bytes.length])].sort((a, b) => a - b);
  const slots = new Uint32Array(ends.length);
  expect(pool.allocate(slots, slots.length)).toBe(slots.length);
  let from = 0;
  for (const [i, p] of slots.entries()) {
    const piece = bytes.subarray(from, ends[i]);
    from = ends[i];
    const start = pool.slot(p) + Math.min(at, pool.stride - piece.length);
    pool.u8.set(piece, start);
    pool.offset[p] = start;
    pool.length[p] = piece.length;
    pool.next[p] = slots[i + 1] ?? NO_PACKET;
  }
  return slots[0];
}

/** A ring with these packets in it. */
function arrived(packets: number[]): RxRing {
  return {
    counters: new Float64Array(8),
    broken: null,
    hasChains: true,
    burst: (out, max) => {
      const now = packets.splice(0, max);
      out.set(now);
      return now.length;
    },
    networkHeader: () => 0,
    enableInterrupts: () => false,
    disableInterrupts: () => {},
  };
}

/** What the transmit queue makes of `p`: the frames that it sends. */
function sent(p: number): Uint8Array[] {
  expect(setup.tx.burst(Uint32Array.of(p), 1)).toBe(1);
  const frames = setup.ring.sent.splice(0).map(({ bytes }) => bytes);
  setup.ring.complete();
  return frames;
}

/** What the receive queue makes of the packets. */
function received(...packets: number[]): { frames: Uint8Array[]; sas: number[]; rx: NicRxQueue } {
  const { pool, manager } = setup;
  const rx = new NicRxQueue(0, arrived([...packets]), pool, manager);
  const out = new Uint32Array(packets.length);
  const n = rx.burst(out, packets.length);
  const sas = [...out.subarray(0, n)].map((p) => pool.sa[p]);
  const frames = [...out.subarray(0, n)].map((p) => pool.readChain(p));
  pool.freeChains(out, n);
  return { frames, sas, rx };
}

describe('a packet over several slots under an SA in software', () => {
  it('goes out as one that is in one slot would, and comes back over slots of any sizes', async () => {
    const { manager, pool } = setup;
    const out = await manager.addSa(outbound());
    const back = await manager.addSa(inbound());
    const free = pool.available;
    const places = fc.integer({ min: 0, max: pool.stride });
    const cuts = fc.array(fc.nat(), { minLength: 1, maxLength: 5 });
    fc.assert(
      fc.property(fc.integer({ min: 20, max: 1500 }), cuts, cuts, places, places, (size, there, here, at, to) => {
        const packet = frame(size);
        const p = spread(packet, there, at);
        pool.sa[p] = out.handle;
        const wire = sent(p);
        expect(wire).toHaveLength(1);
        const { frames, sas } = received(spread(wire[0], here, to));
        expect(sas).toEqual([back.handle]);
        expect(Buffer.from(frames[0])).toEqual(packet);
        expect(pool.available).toBe(free);
      }),
      { numRuns: 100 },
    );
  });

  it('may have its payload in memory of the application, which comes back at once', async () => {
    const { manager, pool } = setup;
    const memory = mapAnonymous(8192);
    try {
      const out = await manager.addSa(outbound());
      const back = await manager.addSa(inbound());
      const packet = frame(1200);
      memory.u8.set(packet.subarray(100), 5000);
      const arena = pool.references.open({ ...memory, iova: 0, iovaLow: 0, iovaHigh: 0 });
      const p = spread(packet.subarray(0, 100), [], 1500);
      pool.sa[p] = out.handle;
      pool.next[p] = pool.refer(arena, 5000, packet.length - 100);
      const [protectedFrame] = sent(p);
      const starts = new Uint32Array(2);
      expect([arena.reclaim(starts), starts[0]]).toEqual([1, 5000]);
      const { frames, sas } = received(spread(protectedFrame, [700], 128));
      expect(sas).toEqual([back.handle]);
      expect(Buffer.from(frames[0])).toEqual(packet);
    } finally {
      unmapMemory(memory);
    }
  });

  it('has the checksum filled that was left to the device', async () => {
    const { manager, pool } = setup;
    const out = await manager.addSa(outbound());
    await manager.addSa(inbound());
    const packet = frame(900, 17);
    packet.writeUInt16BE(880, 38);
    // The sum of the pseudo header, as the device wants it.
    packet.writeUInt16BE(0x0a00 + 0x0001 + 0x0a00 + 0x0002 + 17 + 880, 40);
    const p = spread(packet, [30, 500], 128);
    pool.sa[p] = out.handle;
    pool.flags[p] = PacketFlag.needsChecksum;
    pool.checksumStart[p] = 34;
    pool.checksumOffset[p] = 6;
    const { frames } = received(spread(sent(p)[0], [], 128));
    const plain = Buffer.from(frames[0]);
    let sum = 0x0a00 + 0x0001 + 0x0a00 + 0x0002 + 17 + 880;
    for (let at = 34; at < plain.length; at += 2) sum += plain.readUInt16BE(at);
    while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
    expect(sum).toBe(0xffff);
  });

  it('that no slot has room for is dropped with all of its slots, and counted, in both directions', async () => {
    const { manager, pool, tx } = setup;
    const out = await manager.addSa(outbound());
    await manager.addSa(inbound());
    const free = pool.available;
    const p = spread(frame(ROOM), [600, 1200], 128);
    pool.sa[p] = out.handle;
    expect(sent(p)).toEqual([]);
    expect(tx.dropped[Verdict.noRoom]).toBe(1);
    const { frames, rx } = received(spread(frame(ROOM, 50), [600, 1200], 128));
    expect(frames).toEqual([]);
    expect(rx.dropped[Verdict.noRoom]).toBe(1);
    expect(pool.available).toBe(free);
  });

  it('keeps its place among the others: a small replay window misses nothing', async () => {
    const { manager, pool } = setup;
    const out = await manager.addSa(outbound());
    const back = await manager.addSa(inbound({ replayWindow: 32 }));
    const packets = new Uint32Array(60);
    for (let i = 0; i < packets.length; i++) {
      packets[i] = spread(frame(100 + i), i % 7 === 0 ? [40] : [], 128);
      pool.sa[packets[i]] = out.handle;
    }
    expect(setup.tx.burst(packets, packets.length)).toBe(packets.length);
    const wire = setup.ring.sent.splice(0).map(({ bytes }) => bytes);
    setup.ring.complete();
    const again = wire.slice(0, 50).map((bytes, i) => spread(bytes, i === 0 ? [60] : [], 128));
    const { sas } = received(...again);
    expect(sas).toEqual(Array(50).fill(back.handle));
  });
});

describe('a packet over several slots that is not IPsec', () => {
  it('is delivered as it came, where an SA receives in software', async () => {
    await setup.manager.addSa(inbound());
    const { pool } = setup;
    const arp = frame(300);
    arp.writeUInt16BE(0x0806, 12);
    for (const [bytes, cuts] of [
      [frame(900, 6), [200, 700]],
      [frame(3000, 6), [1400]],
      [arp, [100]],
    ] as const) {
      const p = spread(bytes, cuts, 128);
      const isChain = pool.next[p] !== NO_PACKET;
      const { frames, sas } = received(p);
      expect([isChain, sas]).toEqual([true, [0]]);
      expect(Buffer.from(frames[0])).toEqual(bytes);
    }
  });

  it('is looked at as a whole when its first slot does not hold its headers', async () => {
    await setup.manager.addSa(inbound());
    const bytes = frame(900, 6);
    const { frames } = received(spread(bytes, [LINK_HEADER], 128));
    expect(frames.map((one) => Buffer.from(one))).toEqual([bytes]);
  });
});

import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Verdict } from '../../src/fallback/verdict.ts';
import { SaPlace } from '../../src/ipsec/sa-state.ts';
import { NicRxQueue, type RxRing } from '../../src/nic/rx-queue.ts';
import { PacketFlag } from '../../src/packet/pool.ts';
import { ChecksumState, transportChecksum } from '../../src/packet/transport-checksum.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';
import { inTunnel, type LargeOptions, large } from '../device/helpers/large.ts';
import { inbound, outbound } from '../ipsec/support.ts';
import { type TxSetup, txSetup } from './support.ts';

let setup: TxSetup;

beforeEach(() => {
  setup = txSetup();
});

afterEach(() => setup.close());

/** An inline outbound SA without a device: what the data path knows of one. */
function inlineSa(handle: number, longest = 1400): number {
  setup.manager.state.add(handle, outbound(), SaPlace.inlineOutbound, longest, null);
  return handle;
}

const tcp = (payload: number, size = 1300, more: Partial<LargeOptions> = {}) =>
  large({ version: 4, protocol: 'tcp', payload, size, ...more });

function isChecksummed(frame: Uint8Array): boolean {
  const u8 = new Uint8Array(frame.length + (frame.length & 1));
  u8.set(frame);
  return transportChecksum({ u8, u16: new Uint16Array(u8.buffer) }, 0, frame.length) === ChecksumState.valid;
}

const word = (bytes: Uint8Array, at: number) => (bytes[at] << 8) | bytes[at + 1];

describe('a packet that stands for several, under an SA', () => {
  it('is cut before it is protected in software: each segment is a packet with a sequence number of its own', async () => {
    const { pool, manager, ring, tx, make } = setup;
    const sa = await manager.addSa(outbound());
    const packet = tcp(65535 - 40, 1360);
    const free = pool.available;
    expect(tx.burst(Uint32Array.of(make(packet, sa.handle)), 1)).toBe(1);
    const count = Math.ceil(packet.payload.length / 1360);
    expect(ring.sent).toHaveLength(count);
    for (const [k, { bytes, flags, sa: handle }] of ring.sent.entries()) {
      expect([bytes[23], handle, flags & (PacketFlag.segmented | PacketFlag.needsChecksum)]).toEqual([50, 0, 0]);
      // ESP: SPI, then the sequence number.
      expect([word(bytes, 36), word(bytes, 40)]).toEqual([0x1000, k + 1]);
      expect(bytes.length).toBeLessThanOrEqual(1514);
    }
    expect(sa.traffic().packets).toBe(BigInt(count));
    ring.complete();
    expect(pool.available).toBe(free);
  });

  it.each([
    { name: 'TCP over IPv4', packet: tcp(30000) },
    { name: 'TCP over IPv6', packet: tcp(20000, 1200, { version: 6, extension: 8 }) },
    { name: 'UDP over IPv4', packet: large({ version: 4, protocol: 'udp', payload: 9999, size: 1111 }) },
    { name: 'in a UDP tunnel', packet: inTunnel(tcp(9000, 1200), { outer: 4, checksum: true }) },
    { name: 'of one segment', packet: tcp(100) },
  ])('is cut before it is handed to an inline SA, too: $name', ({ packet }) => {
    const { ring, tx, make, manager, pool } = setup;
    const handle = inlineSa(7);
    const free = pool.available;
    expect(tx.burst(Uint32Array.of(make(packet, handle, 300)), 1)).toBe(1);
    const { gsoSize = 1, hdrLen = 0 } = packet.header;
    const count = Math.ceil(packet.payload.length / gsoSize);
    expect(ring.sent.map(({ sa, flags }) => [sa, flags])).toEqual(new Array(count).fill([handle, 0]));
    expect(ring.sent.every(({ bytes }) => isChecksummed(bytes))).toBe(true);
    const payload = Buffer.concat(ring.sent.map(({ bytes }) => bytes.subarray(hdrLen)));
    expect(payload.equals(packet.payload)).toBe(true);
    expect(manager.state.packets[handle]).toBe(count);
    expect(manager.state.bytes[handle]).toBe(ring.sent.reduce((sum, { bytes }) => sum + bytes.length - 14, 0));
    ring.complete();
    expect(pool.available).toBe(free);
  });

  it('has TCP segments no longer than what the SA can carry; datagrams are left as they are, and dropped', () => {
    const { ring, tx, make } = setup;
    const handle = inlineSa(7, 1000);
    expect(tx.burst(Uint32Array.of(make(tcp(5000, 1448), handle)), 1)).toBe(1);
    expect(ring.sent.map(({ bytes }) => bytes.length)).toEqual([1014, 1014, 1014, 1014, 1014, 200 + 54]);
    ring.sent.length = 0;
    const datagrams = large({ version: 4, protocol: 'udp', payload: 5000, size: 1448 });
    expect(tx.burst(Uint32Array.of(make(datagrams, handle)), 1)).toBe(1);
    expect(ring.sent.map(({ bytes }) => bytes.length)).toEqual([5000 - 3 * 1448 + 42]);
    expect(tx.dropped[Verdict.tooBig]).toBe(3);
  });

  it('stops at the hard limit of its SA', async () => {
    const { manager, ring, tx, make, pool } = setup;
    const lifetime = { softPackets: 0n, hardPackets: 3n, softBytes: 0n, hardBytes: 0n };
    const sa = await manager.addSa(outbound({ lifetime }));
    const free = pool.available;
    tx.burst(Uint32Array.of(make(tcp(13000), sa.handle)), 1);
    expect(ring.sent).toHaveLength(3);
    expect(tx.dropped[Verdict.expired]).toBe(7);
    ring.complete();
    expect(pool.available).toBe(free);
  });

  it('without an SA goes to the ring as it is', async () => {
    const { manager, ring, tx, make } = setup;
    await manager.addSa(outbound());
    const packet = tcp(9000);
    tx.burst(Uint32Array.of(make(packet, 0)), 1);
    expect(ring.sent).toHaveLength(1);
    expect(ring.sent[0].bytes).toEqual(packet.frame);
    expect(ring.sent[0].flags & PacketFlag.segmented).not.toBe(0);
  });

  it('under an SA that is not there never leaves', async () => {
    const { manager, ring, tx, make, pool } = setup;
    await manager.addSa(outbound());
    const free = pool.available;
    for (const handle of [9, 64, 0xffffffff]) expect(tx.burst(Uint32Array.of(make(tcp(9000), handle)), 1)).toBe(1);
    expect(ring.sent).toEqual([]);
    expect(pool.available).toBe(free);
  });
});

describe('room', () => {
  it('in the ring for only some of the segments: the packet stays with the caller, and goes when there is more', () => {
    setup.close();
    setup = txSetup({ ring: 32 });
    const { ring, tx, make } = setup;
    const handle = inlineSa(7);
    const burst = Uint32Array.from({ length: 3 }, (_, i) => make(tcp(13000, 1300, { id: i }), handle));
    ring.room = 25;
    expect(tx.burst(burst, 3)).toBe(2);
    expect(ring.sent).toHaveLength(20);
    expect(setup.pool.flags[burst[2]] & PacketFlag.segmented).not.toBe(0);
    expect(tx.burst(burst.subarray(2), 1)).toBe(0);
    ring.complete();
    expect(tx.burst(burst.subarray(2), 1)).toBe(1);
    expect(ring.sent.map(({ bytes }) => word(bytes, 18))).toEqual(
      [0, 1, 2].flatMap((id) => Array.from({ length: 10 }, (_, k) => id + k)),
    );
  });

  it('that there can never be: the packet is dropped', () => {
    setup.close();
    setup = txSetup({ ring: 32 });
    const { ring, tx, make, pool } = setup;
    const handle = inlineSa(7);
    const free = pool.available;
    expect(tx.burst(Uint32Array.of(make(tcp(33 * 1300), handle), make(tcp(32 * 1300), handle)), 2)).toBe(2);
    expect(ring.sent).toHaveLength(32);
    expect(tx.dropped[Verdict.malformed]).toBe(1);
    ring.complete();
    expect(pool.available).toBe(free);
  });

  it('in the pool for only some of them: the packet waits', () => {
    const { ring, tx, make, pool } = setup;
    const handle = inlineSa(7);
    const p = make(tcp(13000), handle);
    const held = new Uint32Array(pool.available - 5);
    pool.allocate(held, held.length);
    expect(tx.burst(Uint32Array.of(p), 1)).toBe(0);
    pool.free(held, held.length);
    expect(tx.burst(Uint32Array.of(p), 1)).toBe(1);
    expect(ring.sent).toHaveLength(10);
  });
});

describe('a packet that cannot be cut', () => {
  it.each<{ name: string; spoil(p: number): void }>([
    { name: 'no checksum to fill', spoil: (p) => (setup.pool.flags[p] = PacketFlag.segmented) },
    { name: 'segments of nothing', spoil: (p) => (setup.pool.gsoSize[p] = 0) },
    { name: 'no type', spoil: (p) => (setup.pool.gsoType[p] = 0) },
    { name: 'the type of UFO', spoil: (p) => (setup.pool.gsoType[p] = 3) },
    { name: 'a type without a number', spoil: (p) => (setup.pool.gsoType[p] = 31) },
    { name: 'headers elsewhere', spoil: (p) => (setup.pool.checksumStart[p] = 38) },
    { name: 'headers that reach into the next slot', spoil: (p) => (setup.pool.length[p] = 50) },
    { name: 'an empty slot', spoil: (p) => (setup.pool.length[setup.pool.next[p]] = 0) },
    { name: 'a slot that reaches into the next', spoil: (p) => (setup.pool.length[setup.pool.next[p]] = 2000) },
    { name: 'a tunnel where none is', spoil: (p) => (setup.pool.gsoType[p] |= 0x20) },
  ])('is dropped and counted, with all its slots: $name', ({ spoil }) => {
    const { ring, tx, make, pool } = setup;
    const handle = inlineSa(7);
    const free = pool.available;
    const p = make(tcp(9000), handle);
    spoil(p);
    expect(tx.burst(Uint32Array.of(p), 1)).toBe(1);
    expect(ring.sent).toEqual([]);
    expect(tx.dropped[Verdict.malformed]).toBe(1);
    expect(pool.available).toBe(free);
  });
});

it('a packet whose payload is memory of the application is cut like any other, and the memory comes back', () => {
  setup.close();
  setup = txSetup({ references: 8 });
  const { ring, tx, make, pool } = setup;
  const memory = mapAnonymous(0x10000);
  try {
    const arena = pool.references.open({ ...memory, iova: 0, iovaLow: 0, iovaHigh: 0 });
    const handle = inlineSa(7);
    const packet = tcp(20000, 1300);
    const headers = packet.header.hdrLen ?? 0;
    memory.u8.set(packet.payload, 100);
    const before = pool.available;
    // Headers and a little payload in a slot, the rest in two pieces of the application's memory.
    const p = make({ ...packet, frame: packet.frame.subarray(0, headers + 10) }, handle);
    const first = pool.refer(arena, 110, 7000);
    const second = pool.refer(arena, 7110, 20000 - 7010);
    pool.next[p] = first;
    pool.next[first] = second;
    expect(tx.burst(Uint32Array.of(p), 1)).toBe(1);
    expect(Buffer.concat(ring.sent.map(({ bytes }) => bytes.subarray(headers))).equals(packet.payload)).toBe(true);
    expect(ring.sent.every(({ bytes }) => isChecksummed(bytes))).toBe(true);
    const back = new Uint32Array(4);
    expect(arena.reclaim(back)).toBe(2);
    expect([...back.subarray(0, 2)]).toEqual([110, 7110]);
    // One that is no reference any more is refused.
    const again = make({ ...packet, frame: packet.frame.subarray(0, headers + 10) }, handle);
    pool.next[again] = first;
    const count = ring.sent.length;
    expect(() => tx.burst(Uint32Array.of(again), 1)).toThrow(RangeError);
    expect(ring.sent).toHaveLength(count);
    ring.complete();
    expect(pool.available).toBe(before);
  } finally {
    unmapMemory(memory);
  }
});

describe('a chain of slots', () => {
  it('that is one packet is protected as one if a slot has room for it, and else dropped with all its slots', async () => {
    const { manager, ring, tx, make, pool } = setup;
    const sa = await manager.addSa(outbound());
    const free = pool.available;
    const [fits, large] = [900, 2400].map((payload) => make(tcp(payload), sa.handle, 500));
    pool.flags[fits] = 0;
    pool.flags[large] = 0;
    expect(tx.burst(Uint32Array.of(fits, large), 2)).toBe(2);
    expect(ring.sent.map(({ packet }) => packet)).toEqual([fits]);
    expect(ring.sent[0].bytes.length).toBeGreaterThan(900 + 54 + 36);
    expect(tx.dropped[Verdict.noRoom]).toBe(1);
    ring.complete();
    expect(pool.available).toBe(free);
  });

  it('counts with all its bytes against what an inline SA can carry', () => {
    const { ring, tx, make, pool, manager } = setup;
    const handle = inlineSa(7, 1000);
    const [fits, long] = [900, 1000].map((payload) => make(tcp(payload), handle, 500));
    pool.flags[fits] = 0;
    pool.flags[long] = 0;
    expect(tx.burst(Uint32Array.of(fits, long), 2)).toBe(2);
    expect(ring.sent.map(({ packet }) => packet)).toEqual([fits]);
    expect(manager.state.bytes[handle]).toBe(900 + 40);
    expect(tx.dropped[Verdict.tooBig]).toBe(1);
  });
});

describe('a large packet that the device has opened', () => {
  /** A ring with these packets in it. */
  class Arrived implements RxRing {
    readonly counters = new Float64Array(8);
    readonly broken = null;
    readonly hasChains = true;
    readonly #packets: number[];

    constructor(packets: number[]) {
      this.#packets = packets;
    }

    burst(out: Uint32Array, max: number): number {
      const now = this.#packets.splice(0, max);
      out.set(now);
      return now.length;
    }

    networkHeader(): number {
      return 0;
    }
    enableInterrupts(): boolean {
      return false;
    }
    disableInterrupts(): void {}
  }

  /** A packet over several slots, as it comes under SA `handle`. */
  function arrive(payload: number, handle: number): number {
    const { make, pool } = setup;
    const p = make(tcp(payload), handle, 700);
    pool.flags[p] |= PacketFlag.secured;
    return p;
  }

  it('is delivered as it is, and counts with all its bytes', () => {
    const { pool, manager } = setup;
    manager.state.add(8, inbound(), SaPlace.inlineInbound, 0, null);
    const packets = [arrive(3000, 8), arrive(600, 8), arrive(9000, 8)];
    const rx = new NicRxQueue(0, new Arrived([...packets]), pool, manager);
    const out = new Uint32Array(8);
    expect(rx.burst(out, 8)).toBe(3);
    expect([...out.subarray(0, 3)]).toEqual(packets);
    expect(pool.flags[packets[0]] & PacketFlag.segmented).not.toBe(0);
    expect(manager.state.packets[8]).toBe(3);
    expect(manager.state.bytes[8]).toBe(12600 + 3 * 40);
  });

  it('is dropped with all its slots when its SA may not carry it', () => {
    const { pool, manager } = setup;
    const selector = { destinationPort: 53 };
    manager.state.add(8, inbound({ selector }), SaPlace.inlineInbound, 0, selector);
    const free = pool.available;
    const rx = new NicRxQueue(0, new Arrived([arrive(9000, 8)]), pool, manager);
    expect(rx.burst(new Uint32Array(8), 8)).toBe(0);
    expect(rx.dropped[Verdict.selector]).toBe(1);
    expect(pool.available).toBe(free);
  });
});

it('whatever the mix, order is kept, nothing leaves in the clear that should not, and nothing leaks', async () => {
  const { manager, ring, tx, make, pool } = setup;
  const software = await manager.addSa(outbound());
  const inline = inlineSa(40);
  const one = fc.record({
    handle: fc.constantFrom(0, software.handle, inline, 9),
    payload: fc.integer({ min: 1, max: 9000 }),
    room: fc.integer({ min: 100, max: 1800 }),
    large: fc.boolean(),
  });
  fc.assert(
    fc.property(fc.array(one, { minLength: 1, maxLength: 12 }), (list) => {
      const before = pool.available;
      const dropped = tx.dropped.slice();
      const burst = Uint32Array.from(list, ({ handle, payload, room, large: isLarge }, i) => {
        const packet = tcp(isLarge ? payload : Math.min(payload, 900), 1300, { id: 1000 * i });
        const p = make(packet, handle, isLarge ? room : 1800);
        if (!isLarge) pool.flags[p] = 0;
        return p;
      });
      for (let taken = 0; taken < list.length; ) {
        const n = tx.burst(burst.subarray(taken), list.length - taken);
        taken += n;
        ring.complete();
      }
      const sas = ring.sent.map(({ sa, bytes }) => (bytes[23] === 50 ? software.handle : sa));
      const expected = list.flatMap(({ handle, payload, large: isLarge }) => {
        if (handle === 9) return [];
        return new Array(isLarge && handle !== 0 ? Math.ceil(payload / 1300) : 1).fill(handle);
      });
      expect(sas).toEqual(expected);
      for (const { bytes, sa } of ring.sent) {
        // In the clear only what asked for nothing, or is left to the device.
        if (bytes[23] !== 50 && sa === 0) expect(list.some(({ handle }) => handle === 0)).toBe(true);
      }
      expect(tx.dropped.some((count, i) => count !== dropped[i])).toBe(list.some(({ handle }) => handle === 9));
      ring.sent.length = 0;
      expect(pool.available).toBe(before);
    }),
    { numRuns: 60 },
  );
});

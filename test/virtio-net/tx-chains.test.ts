import { describe, expect, it } from 'vitest';
import { NO_PACKET, PacketFlag } from '../../src/packet/pool.ts';
import { Feature } from '../../src/virtio/features.ts';
import { GsoType, NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { TxCounter } from '../../src/virtio-net/tx.ts';
import { content, queues } from './queue-support.ts';

const OFFLOADS = [Feature.CSUM, Feature.HOST_TSO4, Feature.HOST_TSO6, Feature.HOST_USO, Feature.HOST_ECN];
type Queues = ReturnType<typeof queues>;

/** A packet over as many slots as there are contents; returns its first. */
function chain(q: Queues, contents: Uint8Array[]): number {
  const slots = q.make(contents);
  for (let i = 0; i + 1 < slots.length; i++) q.pool.next[slots[i]] = slots[i + 1];
  return slots[0];
}

function send(q: Queues, ...packets: number[]): number {
  return q.tx.burst(Uint32Array.from(packets), packets.length);
}

function joined(contents: Uint8Array[]): number[] {
  return contents.flatMap((bytes) => [...bytes]);
}

describe('a packet over several slots', () => {
  it.each([
    { name: 'one descriptor for each slot', indirectEntries: 0, taken: 3 },
    { name: 'one indirect descriptor', indirectEntries: 8, taken: 1 },
  ])('is one buffer, as $name, among packets of one slot', ({ indirectEntries, taken }) => {
    for (let at = 0; at < 6; at++) {
      const q = queues({ maxLength: 6000, indirectEntries });
      const singles = q.make(Array.from({ length: 5 }, (_, i) => content(60 + i, i)));
      const parts = [content(1000, 20), content(1, 21), content(1500, 22)];
      const head = chain(q, parts);
      const order = [...singles];
      order.splice(at, 0, head);
      const before = q.tx.room;
      expect(send(q, ...order)).toBe(6);
      expect(before - q.tx.room).toBe(5 + taken);
      const expected = [0, 1, 2, 3, 4].map((i) => [...content(60 + i, i)]);
      expected.splice(at, 0, joined(parts));
      const seen = q.sent();
      expect(seen.map(({ bytes }) => [...bytes])).toEqual(expected);
      expect(seen[at].pieces).toEqual([1032, 1, 1500]);
      expect(q.tx.counters[TxCounter.packets]).toBe(6);
      expect(q.tx.counters[TxCounter.bytes]).toBe(joined(expected.map((bytes) => Uint8Array.from(bytes))).length);
      q.tx.reclaim();
      expect(q.pool.available).toBe(64);
    }
  });

  it('stays with the caller when the ring has no room for all of it, and the packets behind it too', () => {
    const q = queues({ size: 8, maxLength: 6000 });
    const singles = q.make(Array.from({ length: 6 }, (_, i) => content(60, i)));
    const head = chain(q, [content(70), content(71), content(72)]);
    expect(send(q, ...singles, head)).toBe(6);
    expect(q.tx.counters[TxCounter.ringFull]).toBe(1);
    expect(q.sent()).toHaveLength(6);
    expect(send(q, head)).toBe(1);
    expect(q.sent().map(({ bytes }) => bytes.length)).toEqual([70 + 71 + 72]);
  });

  it('takes the room of packets behind it', () => {
    const q = queues({ size: 4, maxLength: 6000 });
    const head = chain(q, [content(70), content(71), content(72)]);
    const behind = q.make([content(60), content(61)]);
    expect(send(q, head, ...behind)).toBe(2);
    expect(q.sent().map(({ bytes }) => bytes.length)).toEqual([213, 60]);
  });

  it.each<{ name: string; spoil(q: Queues, head: number): void }>([
    { name: 'is longer than allowed', spoil: (q, head) => (q.pool.length[head] = 1000) },
    { name: 'has an empty slot', spoil: (q, head) => (q.pool.length[q.pool.next[head]] = 0) },
    { name: 'runs out of a slot', spoil: (q, head) => (q.pool.offset[q.pool.next[head]] += 2048 - 128 - 50) },
    { name: 'begins in front of a slot', spoil: (q, head) => (q.pool.offset[q.pool.next[head]] -= 129) },
    {
      name: 'has more slots than a chain may have',
      spoil: (q, head) => {
        let last = head;
        for (const p of q.make(Array.from({ length: 40 }, () => content(1)))) {
          while (q.pool.next[last] !== NO_PACKET) last = q.pool.next[last];
          q.pool.next[last] = p;
        }
      },
    },
  ])('is dropped with all its slots when it $name', ({ name, spoil }) => {
    const q = queues({ maxLength: 1514, size: 64 });
    const head = chain(q, [content(600), content(100)]);
    spoil(q, head);
    if (name.startsWith('is longer')) q.pool.length[q.pool.next[head]] = 515;
    expect(send(q, head)).toBe(1);
    expect(q.sent()).toEqual([]);
    expect(q.tx.counters[TxCounter.droppedInvalid]).toBe(1);
    expect(q.pool.available).toBeGreaterThanOrEqual(63);
  });

  it('comes back to the pool when the queue is closed', () => {
    const q = queues({ maxLength: 6000 });
    send(q, chain(q, [content(600), content(100), content(5)]));
    q.tx.close();
    expect(q.pool.available).toBe(64);
  });
});

it('chains that the device is done with give their slots back with the next burst, however few they are', () => {
  const q = queues({ features: OFFLOADS, checksum: true, maxLength: 9000 });
  for (let round = 0; round < 10; round++) {
    send(
      q,
      chain(
        q,
        Array.from({ length: 9 }, (_, i) => content(900, i)),
      ),
    );
    q.sent();
    // All but those of this chain, and of the one before.
    expect(q.pool.available).toBeGreaterThanOrEqual(64 - 18);
  }
});

describe('a packet that the device is to segment', () => {
  const TCP_AT = 34;
  /** Ethernet, IPv4 and TCP headers of 20 + `options` bytes, and `payload` bytes. */
  const tcp = (payload: number, options = 0) => {
    const bytes = content(TCP_AT + 20 + options + payload);
    bytes[TCP_AT + 12] = ((20 + options) / 4) << 4;
    return bytes;
  };
  const mark = (q: Queues, p: number, gsoType: number, gsoSize: number, checksumOffset = 16) => {
    q.pool.flags[p] = PacketFlag.needsChecksum | PacketFlag.segmented;
    q.pool.checksumStart[p] = TCP_AT;
    q.pool.checksumOffset[p] = checksumOffset;
    q.pool.gsoType[p] = gsoType;
    q.pool.gsoSize[p] = gsoSize;
  };

  it.each([
    { name: 'TSO4', gsoType: GsoType.TCPV4, options: 0, hdrLen: 54 },
    { name: 'TSO6 with TCP options', gsoType: GsoType.TCPV6, options: 12, hdrLen: 66 },
    { name: 'TSO4 with ECN', gsoType: GsoType.TCPV4 | GsoType.ECN, options: 0, hdrLen: 54 },
    { name: 'USO', gsoType: GsoType.UDP_L4, options: 0, hdrLen: 42, checksumOffset: 6 },
  ])('says so in its header, with the exact length of its headers: $name', (one) => {
    for (const features of [OFFLOADS, [...OFFLOADS, Feature.IPSEC]]) {
      const q = queues({ features, checksum: true, maxLength: 1514, stride: 0x4000 });
      const [p] = q.make([tcp(9000, one.options)]);
      mark(q, p, one.gsoType, 1448, one.checksumOffset);
      expect(send(q, p)).toBe(1);
      const [{ header, bytes }] = q.sent();
      expect(header).toMatchObject({
        flags: NetHeaderFlag.NEEDS_CSUM,
        gsoType: one.gsoType,
        gsoSize: 1448,
        hdrLen: one.hdrLen,
        csumStart: TCP_AT,
        csumOffset: one.checksumOffset ?? 16,
        numBuffers: 0,
      });
      expect(bytes).toEqual(tcp(9000, one.options));
    }
  });

  it('says where its headers are when it is inside a UDP tunnel', () => {
    const tunnels = [Feature.HOST_UDP_TUNNEL_GSO, Feature.HOST_UDP_TUNNEL_GSO_CSUM];
    for (const features of [
      [...OFFLOADS, ...tunnels],
      [...OFFLOADS, ...tunnels, Feature.IPSEC],
    ]) {
      const q = queues({ features, checksum: true, maxLength: 1514, stride: 0x4000 });
      const bytes = content(9000);
      bytes[84 + 12] = 0x50;
      const packets = q.make([bytes, bytes]);
      for (const [i, p] of packets.entries()) {
        mark(q, p, GsoType.TCPV4 | GsoType.UDP_TUNNEL_IPV4, 1400);
        if (i === 0) q.pool.flags[p] |= PacketFlag.outerChecksum;
        q.pool.checksumStart[p] = 84;
        q.pool.outerTransport[p] = 34;
        q.pool.innerNetwork[p] = 64;
      }
      expect(q.tx.burst(packets, 2)).toBe(2);
      const fields = { gsoType: 0x21, hdrLen: 104, gsoSize: 1400, csumStart: 84, outerThOffset: 34, innerNhOffset: 64 };
      const [first, second] = q.sent();
      expect(first.header).toMatchObject({
        ...fields,
        flags: NetHeaderFlag.NEEDS_CSUM | NetHeaderFlag.UDP_TUNNEL_CSUM,
      });
      expect(second.header).toMatchObject({ ...fields, flags: NetHeaderFlag.NEEDS_CSUM });
      expect(first.bytes).toEqual(bytes);
    }
  });

  it('may be 64 KiB in slots of 2 KiB', () => {
    const q = queues({ features: OFFLOADS, checksum: true, maxLength: 1514, size: 64, indirectEntries: 40 });
    const parts = [tcp(1800), ...Array.from({ length: 32 }, (_, i) => content(1920, i))];
    const head = chain(q, parts);
    mark(q, head, GsoType.TCPV4, 1460);
    expect(send(q, head)).toBe(1);
    const [{ header, bytes }] = q.sent();
    expect(header).toMatchObject({ gsoType: GsoType.TCPV4, hdrLen: 54 });
    expect([...bytes]).toEqual(joined(parts));
    q.tx.reclaim();
    expect(q.pool.available).toBe(64);
  });

  it.each<{ name: string; features?: number[]; spoil(q: Queues, p: number): void }>([
    { name: 'a type that was not negotiated', features: [Feature.CSUM, Feature.HOST_USO], spoil: () => {} },
    {
      name: 'ECN without HOST_ECN',
      features: [Feature.CSUM, Feature.HOST_TSO4],
      spoil: (q, p) => (q.pool.gsoType[p] |= GsoType.ECN),
    },
    { name: 'the type of UFO', spoil: (q, p) => (q.pool.gsoType[p] = GsoType.UDP) },
    { name: 'the type of a UDP tunnel', spoil: (q, p) => (q.pool.gsoType[p] |= GsoType.UDP_TUNNEL_IPV4) },
    {
      name: 'an inner header inside the outer one of a tunnel',
      features: [...OFFLOADS, Feature.HOST_UDP_TUNNEL_GSO],
      spoil: (q, p) => {
        q.pool.gsoType[p] |= GsoType.UDP_TUNNEL_IPV4;
        q.pool.outerTransport[p] = 20;
        q.pool.innerNetwork[p] = 27;
      },
    },
    {
      name: 'an outer checksum without the feature for it',
      features: [...OFFLOADS, Feature.HOST_UDP_TUNNEL_GSO],
      spoil: (q, p) => {
        q.pool.gsoType[p] |= GsoType.UDP_TUNNEL_IPV4;
        q.pool.flags[p] |= PacketFlag.outerChecksum;
        q.pool.outerTransport[p] = 14;
        q.pool.innerNetwork[p] = 30;
      },
    },
    {
      name: 'an outer checksum without a tunnel',
      features: [...OFFLOADS, Feature.HOST_UDP_TUNNEL_GSO, Feature.HOST_UDP_TUNNEL_GSO_CSUM],
      spoil: (q, p) => (q.pool.flags[p] |= PacketFlag.outerChecksum),
    },
    { name: 'the type NONE', spoil: (q, p) => (q.pool.gsoType[p] = 0) },
    { name: 'no checksum to fill', spoil: (q, p) => (q.pool.flags[p] = PacketFlag.segmented) },
    { name: 'segments of nothing', spoil: (q, p) => (q.pool.gsoSize[p] = 0) },
    { name: 'only headers', spoil: (q, p) => (q.pool.length[p] = 54) },
    { name: 'a TCP header that does not end inside', spoil: (q, p) => (q.pool.length[p] = 53) },
    { name: 'a TCP header of 16 bytes', spoil: (q, p) => (q.pool.u8[q.pool.offset[p] + TCP_AT + 12] = 0x40) },
    { name: 'more than an IP packet', spoil: (q, p) => (q.pool.length[p] = 65560) },
  ])('is dropped and counted with $name', ({ features = OFFLOADS, spoil }) => {
    const q = queues({ features, checksum: true, maxLength: 1514, stride: 0x11000, packets: 16 });
    const [p] = q.make([tcp(9000)]);
    mark(q, p, GsoType.TCPV4, 1448);
    spoil(q, p);
    expect(send(q, p)).toBe(1);
    expect(q.sent()).toEqual([]);
    expect(q.tx.counters[TxCounter.droppedInvalid]).toBe(1);
    expect(q.pool.available).toBe(16);
  });
});

import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { VirtioError } from '../../src/errors.ts';
import { PacketFlag } from '../../src/packet/pool.ts';
import { Feature } from '../../src/virtio/features.ts';
import { NetHeader, NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { TxCounter } from '../../src/virtio-net/tx.ts';
import { content, queues } from './queue-support.ts';

const IPSEC = [Feature.IPSEC, Feature.OUT_NET_HEADER];

describe('a transmit queue', () => {
  it('sends each packet as one buffer behind a header of zeros, in order', () => {
    const q = queues();
    const contents = [1, 2, 3, 4, 5, 6, 7].map((seed) => content(59 + seed, seed));
    const packets = q.make(contents);
    expect(q.tx.burst(packets, 7)).toBe(7);
    expect(q.notified.tx).toBe(1);
    const sent = q.sent();
    expect(sent.map(({ bytes }) => [...bytes])).toEqual(contents.map((bytes) => [...bytes]));
    for (const { header } of sent) expect(header).toEqual(new NetHeader());
    expect(q.tx.counters[TxCounter.packets]).toBe(7);
    expect(q.tx.counters[TxCounter.bytes]).toBe(contents.reduce((sum, { length }) => sum + length, 0));
  });

  it('writes over what was in the headroom before', () => {
    for (const features of [[], IPSEC]) {
      const q = queues({ features });
      const packets = q.make(Array.from({ length: 5 }, () => content(60)));
      for (const p of packets) q.pool.u8.fill(0xff, q.pool.slot(p), q.pool.slot(p) + 128);
      q.tx.burst(packets, 5);
      for (const { header } of q.sent()) expect(header).toEqual(new NetHeader());
    }
  });

  it.each([
    { name: 'the full header', features: IPSEC, revision: 'virtio-1.4' as const },
    { name: 'the draft’s header', features: [Feature.IPSEC], revision: 'rfc-2025-01' as const },
    {
      name: 'the draft’s header with a hash',
      features: [Feature.IPSEC, Feature.HASH_REPORT],
      revision: 'rfc-2025-01' as const,
    },
  ])('tags packets with the resource of their SA in $name, whatever their place', ({ features, revision }) => {
    fc.assert(
      fc.property(fc.array(fc.constantFrom(0, 3, 77), { minLength: 1, maxLength: 12 }), fc.nat(9), (handles, shift) => {
        const q = queues({ features, revision });
        q.sas.resourceId[3] = 0x1234_5678;
        q.sas.resourceId[77] = 0;
        const packets = q.make(
          handles.map((_, i) => content(70, i)),
          shift,
        );
        for (const [i, handle] of handles.entries()) q.pool.sa[packets[i]] = handle;
        expect(q.tx.burst(packets, handles.length)).toBe(handles.length);
        const sent = q.sent();
        expect(sent).toHaveLength(handles.length);
        for (const [i, { header, bytes }] of sent.entries()) {
          const expected = new NetHeader();
          if (handles[i] !== 0) {
            expected.flags = NetHeaderFlag.SECURITY;
            expected.resourceId = handles[i] === 3 ? 0x1234_5678 : 0;
            expected.resourceType = 0x203;
          }
          expect(header).toEqual(expected);
          expect([...bytes]).toEqual([...content(70, i)]);
        }
      }),
    );
  });

  it.each([
    { name: 'is not on the device', handle: 9, features: IPSEC },
    { name: 'is beyond the table', handle: 100, features: IPSEC },
    { name: 'is no handle at all', handle: 0xffffffff, features: IPSEC },
    { name: 'has the sign bit', handle: 0x80000003, features: IPSEC },
    { name: 'is inline, but IPSEC was not negotiated', handle: 3, features: [] },
  ])('never sends a packet whose SA $name', ({ handle, features }) => {
    for (let at = 0; at < 8; at++) {
      const q = queues({ features });
      q.sas.resourceId[3] = 1;
      const packets = q.make(Array.from({ length: 8 }, (_, i) => content(60, i)));
      q.pool.sa[packets[at]] = handle;
      expect(q.tx.burst(packets, 8)).toBe(8);
      const seen = q.sent().map(({ bytes }) => [...bytes]);
      const expected = Array.from({ length: 8 }, (_, i) => [...content(60, i)]);
      expected.splice(at, 1);
      expect(seen).toEqual(expected);
      expect(q.tx.counters[TxCounter.droppedSa]).toBe(1);
      expect(q.tx.counters[TxCounter.packets]).toBe(7);
      q.tx.reclaim();
      expect(q.pool.available).toBe(64);
    }
  });

  type Queues = ReturnType<typeof queues>;
  it.each<{ name: string; spoil(q: Queues, p: number): void }>([
    { name: 'is empty', spoil: (q, p) => (q.pool.length[p] = 0) },
    { name: 'is longer than allowed', spoil: (q, p) => (q.pool.length[p] = 1515) },
    { name: 'runs out of its slot', spoil: (q, p) => (q.pool.offset[p] += 2048 - 128 - 59) },
    { name: 'has no headroom for the header', spoil: (q, p) => (q.pool.offset[p] = q.pool.slot(p) + 31) },
    { name: 'is in another slot', spoil: (q, p) => (q.pool.offset[p] += 2048) },
    { name: 'has a length of 4 GiB', spoil: (q, p) => (q.pool.length[p] = 0xffffffff) },
    { name: 'has an offset of 4 GiB', spoil: (q, p) => (q.pool.offset[p] = 0xfffffff0) },
    { name: 'is a chain that leads out of the pool', spoil: (q, p) => (q.pool.next[p] = 64) },
    { name: 'wants segments that were not negotiated', spoil: (q, p) => (q.pool.flags[p] = PacketFlag.segmented) },
    {
      name: 'wants a checksum that the device cannot fill',
      spoil: (q, p) => (q.pool.flags[p] = PacketFlag.needsChecksum),
    },
  ])('drops and counts a packet that $name', ({ spoil }) => {
    for (let at = 0; at < 6; at++) {
      const q = queues({ maxLength: 1514 });
      const packets = q.make(Array.from({ length: 6 }, (_, i) => content(60, i)));
      spoil(q, packets[at]);
      expect(q.tx.burst(packets, 6)).toBe(6);
      const expected = [0, 1, 2, 3, 4, 5].filter((i) => i !== at).map((i) => [...content(60, i)]);
      expect(q.sent().map(({ bytes }) => [...bytes])).toEqual(expected);
      expect(q.tx.counters[TxCounter.droppedInvalid]).toBe(1);
      q.tx.reclaim();
      expect(q.pool.available).toBe(64);
    }
  });

  it('asks the device for a checksum when it can fill one inside the packet', () => {
    const q = queues({ checksum: true });
    const packets = q.make(Array.from({ length: 4 }, () => content(60)));
    for (const p of packets) q.pool.flags[p] = PacketFlag.needsChecksum;
    q.pool.checksumStart.fill(34);
    q.pool.checksumOffset[packets[0]] = 16;
    q.pool.checksumOffset[packets[1]] = 24;
    q.pool.checksumOffset[packets[2]] = 25;
    q.pool.checksumOffset[packets[3]] = 0xffff;
    q.pool.sa[packets[1]] = 4;
    q.sas.resourceId[4] = 6;
    q.tx.burst(packets, 4);
    const [a, b, ...rest] = q.sent();
    expect(rest).toEqual([]);
    expect(a.header).toMatchObject({ flags: NetHeaderFlag.NEEDS_CSUM, csumStart: 34, csumOffset: 16, resourceId: 0 });
    const flags = NetHeaderFlag.NEEDS_CSUM | NetHeaderFlag.SECURITY;
    expect(b.header).toMatchObject({ flags, csumStart: 34, csumOffset: 24, resourceId: 6, resourceType: 0x203 });
    expect(q.tx.counters[TxCounter.droppedInvalid]).toBe(2);
  });

  it('takes fewer packets when the ring is full, and the rest stay the caller’s', () => {
    const q = queues();
    const packets = q.make(Array.from({ length: 20 }, (_, i) => content(60, i)));
    expect(q.tx.burst(packets, 20)).toBe(16);
    expect(q.tx.counters[TxCounter.ringFull]).toBe(1);
    expect(q.tx.burst(packets.subarray(16), 4)).toBe(0);
    expect(q.sent()).toHaveLength(16);
    expect(q.tx.burst(packets.subarray(16), 4), 'reclaims by itself').toBe(4);
    expect(q.sent().map(({ bytes }) => [...bytes])).toEqual([16, 17, 18, 19].map((i) => [...content(60, i)]));
    q.tx.reclaim();
    expect(q.pool.available).toBe(64);
  });

  it('returns packets to the pool only when the device is done with them', () => {
    const q = queues();
    const packets = q.make(Array.from({ length: 3 }, () => content(60)));
    q.tx.burst(packets, 3);
    expect(q.tx.reclaim()).toBe(0);
    const heads = q.sent(true).map(({ head }) => head);
    q.txDevice.complete(heads[2], 0);
    expect(q.tx.reclaim()).toBe(1);
    expect(q.pool.available).toBe(62);
    q.tx.close();
    expect(q.pool.available).toBe(64);
  });

  it('sends nothing more, and says why, once the device broke the rules', () => {
    const q = queues();
    q.tx.burst(q.make([content(60)]), 1);
    q.txDevice.complete(9, 0);
    expect(q.tx.reclaim()).toBe(0);
    expect(q.tx.broken).toBeInstanceOf(VirtioError);
    expect(q.tx.broken?.code).toBe('USED_ID');
    const before = q.txDevice.availIdx;
    const packets = q.make([content(60)]);
    expect(q.tx.burst(packets, 1)).toBe(0);
    expect(q.txDevice.availIdx).toBe(before);
    q.pool.free(packets, 1);
  });

  it('throws on a number that is no packet, and has then sent nothing wrong', () => {
    const q = queues();
    const packets = q.make([content(60), content(60)]);
    for (const wrong of [64, 0xffffffff]) {
      expect(() => q.tx.burst(Uint32Array.of(packets[0], wrong), 2)).toThrow(RangeError);
    }
    expect(q.sent().every(({ bytes }) => bytes.length === 60)).toBe(true);
  });
});

import { describe, expect, it } from 'vitest';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { encodeNetHeader, NetHeader, netHeaderLayout, networkHeaderOffset } from '../../src/virtio-net/header.ts';
import { queues } from './queue-support.ts';

/** A frame of this EtherType; the second is behind a VLAN tag. */
function frame(type: number, inner = 0, length = 64): Uint8Array {
  const bytes = new Uint8Array(length).fill(0x5a);
  bytes.set(
    [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, type >>> 8, type & 0xff, 0, 5, inner >>> 8, inner & 0xff].slice(0, length),
  );
  return bytes;
}

const [IPV4, IPV6, ARP, VLAN] = [0x0800, 0x86dd, 0x0806, 0x8100];
const frames = [frame(IPV4), frame(IPV6), frame(ARP), frame(VLAN, IPV4), frame(VLAN, IPV6), frame(VLAN, ARP)];
const offsets = [14, 14, 0, 18, 18, 0];

describe('outer_nh_offset', () => {
  it('is where the IP header is, behind a VLAN tag too', () => {
    expect(frames.map((bytes) => networkHeaderOffset(bytes, 0))).toEqual(offsets);
  });

  it.each([0, 1, 4])('is written on transmit when OUT_NET_HEADER was negotiated, at a shift of %i bytes', (shift) => {
    for (const [features, expected] of [
      [[Feature.IPSEC, Feature.OUT_NET_HEADER], offsets],
      [[Feature.IPSEC], offsets.map(() => 0)],
    ] as const) {
      // Fours take another way than single packets, and so do those with an SA.
      for (const handle of [0, 3]) {
        const q = queues({ features: [...features] });
        q.sas.resourceId[3] = 0x1234_5678;
        const packets = q.make([...frames, ...frames], shift);
        for (const p of packets) q.pool.sa[p] = handle;
        expect(q.tx.burst(packets, 12)).toBe(12);
        const sent = q.sent();
        expect(sent.map(({ header }) => header.outerNhOffset)).toEqual([...expected, ...expected]);
        expect(sent.every(({ header }) => header.resourceId === (handle === 0 ? 0 : 0x1234_5678))).toBe(true);
        expect(sent.map(({ bytes }) => [...bytes])).toEqual([...frames, ...frames].map((bytes) => [...bytes]));
      }
    }
  });

  it('is not written for a frame that ends before it', () => {
    const q = queues({ features: [Feature.IPSEC, Feature.OUT_NET_HEADER] });
    q.tx.burst(q.make([frame(IPV4, 0, 14), frame(VLAN, IPV4, 18)]), 2);
    expect(q.sent().map(({ header }) => header.outerNhOffset)).toEqual([0, 0]);
  });

  it.each([
    { said: 14, features: [Feature.IPSEC, Feature.OUT_NET_HEADER], expected: 14 },
    { said: 63, features: [Feature.IPSEC, Feature.OUT_NET_HEADER], expected: 63 },
    { said: 64, features: [Feature.IPSEC, Feature.OUT_NET_HEADER], expected: 0 },
    { said: 0xffff, features: [Feature.IPSEC, Feature.OUT_NET_HEADER], expected: 0 },
    { said: 14, features: [Feature.IPSEC], expected: 0 },
  ])('of $said is read on receive as $expected with the features $features', ({ said, features, expected }) => {
    const q = queues({ features });
    q.rx.refill();
    // The device writes it whether or not it was negotiated.
    const full = netHeaderLayout(FeatureSet.of(Feature.IPSEC, Feature.OUT_NET_HEADER), 'virtio-1.4');
    const header = Object.assign(new NetHeader(), { numBuffers: 1, outerNhOffset: said });
    const bytes = new Uint8Array(full.length + 64);
    encodeNetHeader(full, header, bytes, 0);
    bytes.set(frames[0], full.length);
    q.receive(bytes);
    const packets = new Uint32Array(4);
    expect(q.rx.burst(packets, 4)).toBe(1);
    expect(q.rx.networkHeader(packets[0])).toBe(expected);
    // Of a packet that begins elsewhere meanwhile nothing is known.
    q.pool.offset[packets[0]] += 4;
    expect(q.rx.networkHeader(packets[0])).toBe(0);
  });
});

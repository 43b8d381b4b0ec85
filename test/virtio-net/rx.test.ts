import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { PacketFlag } from '../../src/packet/pool.ts';
import { Feature } from '../../src/virtio/features.ts';
import {
  encodeNetHeader,
  NetHeader,
  NetHeaderFlag,
  type NetHeaderLayout,
  wireFlags,
} from '../../src/virtio-net/header.ts';
import { RxCounter } from '../../src/virtio-net/rx.ts';
import { runs } from '../depth.ts';
import { content, type Options, queues } from './queue-support.ts';

const { SECURITY, SECURITY_ERR, SECURITY_SA_SOFT_EXPIRY_WARN, NEEDS_CSUM, DATA_VALID } = NetHeaderFlag;
const INBOUND = 0x204;

function packet(layout: NetHeaderLayout, bytes: Uint8Array, fields: Partial<NetHeader> = {}): Uint8Array {
  const out = new Uint8Array(layout.length + bytes.length);
  encodeNetHeader(layout, Object.assign(new NetHeader(), { numBuffers: 1, ...fields }), out, 0);
  out.set(bytes, layout.length);
  return out;
}

function open(options: Options = {}) {
  const q = queues(options);
  q.rx.refill(false);
  const out = new Uint32Array(64);
  const burst = (max = 32) => {
    const n = q.rx.burst(out, max);
    return [...out.subarray(0, n)].map((p) => ({
      p,
      bytes: [...q.pool.read(p)],
      sa: q.pool.sa[p],
      flags: q.pool.flags[p],
    }));
  };
  return { ...q, burst };
}

describe('a receive queue', () => {
  it('fills its ring without a notification, and tells the device when it may', () => {
    const q = open();
    expect(q.rxDevice.waiting).toBe(16);
    expect(q.notified.rx).toBe(0);
    q.rx.start();
    expect(q.notified.rx).toBe(1);
    const [piece] = q.rxDevice.fetch()?.pieces ?? [];
    expect(piece.length).toBe(2048 - 128 + 32);
  });

  it.each([
    { name: 'plain', features: [] },
    { name: 'hash', features: [Feature.HASH_REPORT] },
    { name: 'full', features: [Feature.IPSEC] },
    { name: 'draft', features: [Feature.IPSEC], revision: 'rfc-2025-01' as const },
    { name: 'draft with hash', features: [Feature.IPSEC, Feature.HASH_REPORT], revision: 'rfc-2025-01' as const },
  ])('hands out packets in order without their headers, with the $name layout', ({ features, revision }) => {
    const q = open({ features, ...(revision && { revision }) });
    const contents = Array.from({ length: 7 }, (_, i) => content(60 + i, i));
    for (const bytes of contents) q.receive(packet(q.layout, bytes));
    expect(q.burst(3).map(({ bytes }) => bytes)).toEqual(contents.slice(0, 3).map((bytes) => [...bytes]));
    expect(q.burst()).toMatchObject(contents.slice(3).map((bytes) => ({ bytes: [...bytes], sa: 0, flags: 0 })));
    expect(q.burst()).toEqual([]);
    expect(q.rx.counters[RxCounter.packets]).toBe(7);
    expect(q.rx.counters[RxCounter.bytes]).toBe(contents.reduce((sum, { length }) => sum + length, 0));
  });

  it('holds a packet that fills the slot to its end', () => {
    const q = open();
    const bytes = content(2048 - 128);
    q.receive(packet(q.layout, bytes));
    expect(q.burst()[0].bytes).toEqual([...bytes]);
  });

  it('gives the device new buffers in bursts', () => {
    const q = open({ size: 16 });
    for (let i = 0; i < 3; i++) q.receive(packet(q.layout, content(60)));
    q.burst();
    expect(q.rxDevice.waiting, 'not for three').toBe(13);
    q.receive(packet(q.layout, content(60)));
    q.burst();
    expect(q.rxDevice.waiting).toBe(16);
  });

  it('counts when the pool is exhausted, and goes on when packets come back', () => {
    const q = open({ size: 16, packets: 20 });
    const held: number[] = [];
    for (let round = 0; round < 5; round++) {
      for (let i = 0; i < 4 && q.rxDevice.waiting > 0; i++) q.receive(packet(q.layout, content(60, i)));
      held.push(...q.burst().map(({ p }) => p));
    }
    expect(held).toHaveLength(20);
    expect(q.rx.counters[RxCounter.poolExhausted]).toBeGreaterThan(0);
    expect(q.burst()).toEqual([]);
    q.pool.free(Uint32Array.from(held), held.length);
    q.burst();
    q.receive(packet(q.layout, content(61)));
    expect(q.burst()).toHaveLength(1);
  });

  it('returns all its packets to the pool when it is closed', () => {
    const q = open();
    q.receive(packet(q.layout, content(60)));
    q.rx.close();
    expect(q.pool.available).toBe(64);
    expect(q.burst()).toEqual([]);
    expect(q.rx.broken?.code).toBe('QUEUE_CLOSED');
  });

  it('hands out nothing more once the device broke the rules', () => {
    const q = open();
    q.receive(packet(q.layout, content(60)));
    q.receive(packet(q.layout, content(60)), 2048 - 128 + 33);
    expect(q.burst()).toHaveLength(1);
    expect(q.rx.broken?.code).toBe('USED_LENGTH');
    expect(q.burst()).toEqual([]);
  });

  it.each([
    { name: 'no room for a header', make: (l: NetHeaderLayout) => packet(l, content(60)), used: 31 },
    { name: 'a used length of 0', make: (l: NetHeaderLayout) => packet(l, content(60)), used: 0 },
    { name: 'only a header', make: (l: NetHeaderLayout) => packet(l, content(60)), used: 32 },
    { name: 'a GSO type', make: (l: NetHeaderLayout) => packet(l, content(60), { gsoType: 1 }), used: 92 },
    { name: 'the ECN bit', make: (l: NetHeaderLayout) => packet(l, content(60), { gsoType: 0x80 }), used: 92 },
  ])('drops and counts a packet with $name, wherever it is in a burst', ({ make, used }) => {
    for (let at = 0; at < 6; at++) {
      const q = open();
      for (let i = 0; i < 6; i++) {
        if (i === at) q.receive(make(q.layout), used);
        else q.receive(packet(q.layout, content(60, i)));
      }
      const expected = [0, 1, 2, 3, 4, 5].filter((i) => i !== at).map((i) => [...content(60, i)]);
      expect(q.burst().map(({ bytes }) => bytes)).toEqual(expected);
      expect(q.rx.counters[RxCounter.droppedInvalid]).toBe(1);
      expect(q.rx.broken).toBeNull();
    }
  });
});

it('num_buffers is not looked at without MRG_RXBUF, because QEMU 7.2 leaves it as it was', () => {
  const q = open();
  for (const numBuffers of [0, 1, 2, 0xffff]) q.receive(packet(q.layout, content(60), { numBuffers }));
  expect(q.burst()).toHaveLength(4);
});

describe('security of a received packet', () => {
  it.each(['virtio-1.4', 'rfc-2025-01'] as const)('is exactly what %s headers and the SA table allow', (revision) => {
    const fields = fc.record({
      flags: fc.constantFrom(
        0,
        SECURITY,
        SECURITY,
        SECURITY | SECURITY_ERR,
        SECURITY_ERR,
        SECURITY | SECURITY_SA_SOFT_EXPIRY_WARN,
        SECURITY_SA_SOFT_EXPIRY_WARN,
        SECURITY | SECURITY_ERR | SECURITY_SA_SOFT_EXPIRY_WARN,
      ),
      resourceId: fc.constantFrom(7, 7, 7, 0, 8, 49, 50, 0x80000007, 0xffffffff, 0x10007),
      resourceType: fc.constantFrom(INBOUND, INBOUND, INBOUND, 0x203, 0, 0xffff),
    });
    fc.assert(
      fc.property(fc.array(fields, { minLength: 1, maxLength: 13 }), (list) => {
        const q = open({ features: [Feature.IPSEC], revision });
        q.sas.handle[7] = 70;
        q.sas.handle[0] = 71;
        q.sas.handle[49] = 0xfffffff0;
        const known = new Map([
          [7, 70],
          [0, 71],
          [49, 0xfffffff0],
        ]);
        for (const one of list) q.receive(packet(q.layout, content(60), one));
        const received = q.burst();
        expect(received).toHaveLength(list.length);
        for (const [i, { flags, resourceId, resourceType }] of list.entries()) {
          const claims = (flags & SECURITY) !== 0 && (flags & SECURITY_ERR) === 0;
          const sa = claims && resourceType === INBOUND ? (known.get(resourceId) ?? 0) : 0;
          const warned = revision === 'virtio-1.4' && (flags & SECURITY_SA_SOFT_EXPIRY_WARN) !== 0;
          let expected = 0;
          if (sa !== 0) expected = PacketFlag.secured | (warned ? PacketFlag.softExpiry : 0);
          else if (claims || (flags & SECURITY_ERR) !== 0) expected = PacketFlag.securityError;
          expect(received[i]).toMatchObject({ sa, flags: expected });
        }
      }),
      { numRuns: runs(200) },
    );
  });

  it('is counted by what went wrong', () => {
    const q = open();
    q.sas.handle[7] = 70;
    const send = (flags: number, resourceId = 7) =>
      q.receive(packet(q.layout, content(60), { flags, resourceId, resourceType: INBOUND }));
    send(SECURITY);
    send(SECURITY, 8);
    send(SECURITY | SECURITY_ERR);
    send(SECURITY | SECURITY_SA_SOFT_EXPIRY_WARN);
    q.burst();
    expect(q.rx.counters[RxCounter.unknownSa]).toBe(1);
    expect(q.rx.counters[RxCounter.securityError]).toBe(1);
    expect(q.rx.counters[RxCounter.softExpiry]).toBe(1);
    expect(q.rx.counters[RxCounter.packets]).toBe(4);
  });

  it('is found for ids of more than 16 bits too', () => {
    const q = open({ inbound: 0x10010 });
    q.sas.handle[7] = 1;
    q.sas.handle[0x10007] = 2;
    for (const resourceId of [7, 0x10007, 7, 0x10007, 7]) {
      q.receive(packet(q.layout, content(60), { flags: SECURITY, resourceId, resourceType: INBOUND }));
    }
    expect(q.burst().map(({ sa }) => sa)).toEqual([1, 2, 1, 2, 1]);
  });

  it('is nothing that a device can claim without IPSEC', () => {
    for (const features of [[], [Feature.OUT_NET_HEADER]]) {
      const q = open({ features });
      q.sas.handle.fill(5);
      const bytes = packet(q.layout, content(60));
      bytes[0] = SECURITY | SECURITY_SA_SOFT_EXPIRY_WARN;
      for (let i = 0; i < 5; i++) q.receive(bytes);
      for (const { sa, flags } of q.burst()) expect({ sa, flags }).toEqual({ sa: 0, flags: 0 });
    }
  });

  it('of an earlier packet does not stay with the slot', () => {
    const q = open({ size: 4, packets: 8 });
    q.sas.handle[7] = 70;
    const secure = { flags: SECURITY, resourceId: 7, resourceType: INBOUND };
    for (let round = 0; round < 20; round++) {
      const secured = round % 2 === 0;
      for (let i = 0; i < 4; i++) q.receive(packet(q.layout, content(60), secured ? secure : {}));
      const received = q.burst();
      expect(received).toHaveLength(4);
      for (const { p, sa, flags } of received) {
        expect([sa, flags]).toEqual(secured ? [70, PacketFlag.secured] : [0, 0]);
        q.pool.free(Uint32Array.of(p), 1);
      }
      q.rx.refill();
    }
  });
});

describe('checksums of a received packet', () => {
  it('are passed on when GUEST_CSUM was negotiated, and must lie inside the packet', () => {
    const q = open({ checksum: true });
    const cases = [
      { flags: NEEDS_CSUM, csumStart: 34, csumOffset: 16 },
      { flags: NEEDS_CSUM, csumStart: 34, csumOffset: 24 },
      { flags: NEEDS_CSUM, csumStart: 34, csumOffset: 25 },
      { flags: NEEDS_CSUM, csumStart: 0xffff, csumOffset: 0xffff },
      { flags: DATA_VALID, csumStart: 99, csumOffset: 99 },
    ];
    for (const fields of cases) q.receive(packet(q.layout, content(60), fields));
    const received = q.burst();
    expect(received.map(({ flags }) => flags)).toEqual([
      PacketFlag.needsChecksum,
      PacketFlag.needsChecksum,
      PacketFlag.checksumValid,
    ]);
    expect(q.pool.checksumStart[received[0].p]).toBe(34);
    expect(q.pool.checksumOffset[received[0].p]).toBe(16);
    expect(q.rx.counters[RxCounter.droppedInvalid]).toBe(2);
  });

  it('are ignored without GUEST_CSUM', () => {
    const q = open();
    const flags = wireFlags(q.layout, NEEDS_CSUM | DATA_VALID);
    for (let i = 0; i < 4; i++) q.receive(packet(q.layout, content(60), { flags, csumStart: 9999 }));
    expect(q.burst().map((one) => one.flags)).toEqual([0, 0, 0, 0]);
  });
});

import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { NO_PACKET, PacketFlag } from '../../src/packet/pool.ts';
import { Feature } from '../../src/virtio/features.ts';
import { encodeNetHeader, GsoType, NetHeader, NetHeaderFlag } from '../../src/virtio-net/header.ts';
import { RxCounter } from '../../src/virtio-net/rx.ts';
import { runs } from '../depth.ts';
import { content, type Options, queues } from './queue-support.ts';

const { NEEDS_CSUM, SECURITY } = NetHeaderFlag;
/** Room for the packet in a slot of 256 bytes. */
const ROOM = 256 - 128;

function open(options: Options = {}) {
  const q = queues({ features: [Feature.MRG_RXBUF], stride: 256, size: 32, ...options });
  q.rx.refill(false);
  const out = new Uint32Array(64);

  /** Spreads a packet over buffers as a device does, and says so; `said` is what `num_buffers` claims instead. */
  const deliver = (bytes: Uint8Array, fields: Partial<NetHeader> = {}, said?: number) => {
    const whole = new Uint8Array(q.layout.length + bytes.length);
    whole.set(bytes, q.layout.length);
    const room = ROOM + q.layout.length;
    const buffers = Math.ceil(whole.length / room);
    const header = Object.assign(new NetHeader(), { numBuffers: said ?? buffers, ...fields });
    encodeNetHeader(q.layout, header, whole, 0);
    for (let at = 0; at < whole.length; at += room) q.receive(whole.slice(at, at + room));
    return buffers;
  };
  const burst = (max = 64) => {
    const n = q.rx.burst(out, max);
    return [...out.subarray(0, n)];
  };
  const read = (max = 64) => burst(max).map((p) => [...q.pool.readChain(p)]);
  const free = (packets: number[]) => q.pool.freeChains(Uint32Array.from(packets), packets.length);
  return { ...q, deliver, burst, read, free };
}

describe('a packet over several buffers', () => {
  it('comes out whole, whatever the lengths around it and the size of bursts', () => {
    const lengths = fc.array(fc.integer({ min: 1, max: 700 }), { minLength: 1, maxLength: 8 });
    fc.assert(
      fc.property(lengths, fc.integer({ min: 1, max: 9 }), fc.boolean(), (list, max, full) => {
        const q = open({ features: [Feature.MRG_RXBUF, ...(full ? [Feature.IPSEC] : [])], size: 64, packets: 128 });
        const seen: number[][] = [];
        for (const [i, length] of list.entries()) {
          q.deliver(content(length, i));
          for (const p of q.burst(max)) {
            seen.push([...q.pool.readChain(p)]);
            q.free([p]);
          }
        }
        for (let i = 0; i < 100; i++) {
          for (const p of q.burst(max)) {
            seen.push([...q.pool.readChain(p)]);
            q.free([p]);
          }
        }
        expect(seen).toEqual(list.map((length, i) => [...content(length, i)]));
        expect(q.rx.counters[RxCounter.packets]).toBe(list.length);
        expect(q.rx.counters[RxCounter.bytes]).toBe(list.reduce((sum, length) => sum + length, 0));
        q.rx.close();
        expect(q.pool.available).toBe(128);
      }),
      { numRuns: runs(100) },
    );
  });

  it('is a chain of slots, of which the first has all that is known of it', () => {
    const q = open({ features: [Feature.MRG_RXBUF, Feature.IPSEC], checksum: true });
    q.sas.handle[7] = 70;
    const fields = { flags: SECURITY | NEEDS_CSUM, csumStart: 34, csumOffset: 16, resourceId: 7, resourceType: 0x204 };
    expect(q.deliver(content(400), fields)).toBe(3);
    const [p] = q.burst();
    expect(q.pool.sa[p]).toBe(70);
    expect(q.pool.flags[p]).toBe(PacketFlag.secured | PacketFlag.needsChecksum);
    expect(q.pool.length[p]).toBe(ROOM);
    const second = q.pool.next[p];
    const third = q.pool.next[second];
    expect(q.pool.length[second]).toBe(ROOM + 32);
    expect(q.pool.length[third]).toBe(400 - ROOM - ROOM - 32);
    expect(q.pool.next[third]).toBe(NO_PACKET);
    expect(q.pool.chainLength(p)).toBe(400);
  });

  it('waits for buffers that are not there yet, and gives them back when the queue is closed', () => {
    const q = open();
    const whole = new Uint8Array(12 + ROOM);
    encodeNetHeader(q.layout, Object.assign(new NetHeader(), { numBuffers: 3 }), whole, 0);
    q.receive(whole);
    expect(q.burst()).toEqual([]);
    q.receive(content(ROOM + 12));
    expect(q.burst()).toEqual([]);
    q.receive(content(10));
    const [p] = q.burst();
    expect(q.pool.chainLength(p)).toBe(ROOM + ROOM + 12 + 10);
    q.free([p]);
    q.receive(whole);
    q.burst();
    q.rx.close();
    expect(q.pool.available).toBe(64);
  });

  it('is dropped with all its buffers when its header may not be accepted, and the next one is not', () => {
    const q = open();
    q.deliver(content(400), { gsoType: GsoType.TCPV4, flags: NEEDS_CSUM, gsoSize: 100 });
    q.deliver(content(401));
    expect(q.read()).toEqual([[...content(401)]]);
    expect(q.rx.counters[RxCounter.droppedInvalid]).toBe(1);
    q.rx.close();
    // All but the three that were handed out.
    expect(q.pool.available).toBe(61);
  });

  it('is dropped when one of its buffers is empty', () => {
    const q = open();
    const whole = new Uint8Array(12 + ROOM);
    encodeNetHeader(q.layout, Object.assign(new NetHeader(), { numBuffers: 2 }), whole, 0);
    q.receive(whole);
    q.receive(new Uint8Array(0));
    q.deliver(content(60));
    expect(q.read()).toEqual([[...content(60)]]);
    expect(q.rx.counters[RxCounter.droppedInvalid]).toBe(1);
  });

  it('of no buffers is dropped', () => {
    const q = open();
    q.deliver(content(60), {}, 0);
    q.deliver(content(61));
    expect(q.read()).toEqual([[...content(61)]]);
    expect(q.rx.counters[RxCounter.droppedInvalid]).toBe(1);
  });

  it('of less than a header is dropped, whatever it says', () => {
    const q = open();
    q.receive(new Uint8Array(11).fill(0xff));
    q.deliver(content(61));
    expect(q.read()).toEqual([[...content(61)]]);
  });

  it('of more buffers than the longest packet needs closes the queue, and nothing leaks', () => {
    for (const [stride, size, said] of [
      [256, 32, 33],
      [256, 32, 0xffff],
      [2048, 64, 36],
    ]) {
      const q = open({ stride, size, packets: 128 });
      q.deliver(content(50));
      q.deliver(content(60), {}, said);
      q.deliver(content(61));
      expect(q.read()).toEqual([[...content(50)]]);
      expect(q.rx.broken?.code).toBe('NUM_BUFFERS');
      expect(q.read()).toEqual([]);
      q.rx.close();
      expect(q.pool.available).toBe(127);
    }
  });
});

describe('a packet that stands for segments', () => {
  const features = [Feature.GUEST_CSUM, Feature.GUEST_TSO4, Feature.GUEST_USO4];
  const tso = { flags: NEEDS_CSUM, gsoType: GsoType.TCPV4, gsoSize: 1448, csumStart: 34, csumOffset: 16 };

  it.each([
    { name: 'in one buffer', merge: [] },
    { name: 'over several buffers', merge: [Feature.MRG_RXBUF] },
  ])('tells its type and size, $name', ({ merge }) => {
    const q = open({ features: [...features, ...merge], checksum: true });
    for (const gsoType of [GsoType.TCPV4, GsoType.UDP_L4]) {
      const length = merge.length > 0 ? 900 : 100;
      q.deliver(content(length), { ...tso, gsoType });
      const [p] = q.burst();
      expect(q.pool.flags[p]).toBe(PacketFlag.needsChecksum | PacketFlag.segmented);
      expect([q.pool.gsoType[p], q.pool.gsoSize[p]]).toEqual([gsoType, 1448]);
      expect(q.pool.chainLength(p)).toBe(length);
    }
  });

  it.each([
    { name: 'a type that was not negotiated', fields: { gsoType: GsoType.TCPV6 } },
    { name: 'UFO', fields: { gsoType: GsoType.UDP } },
    { name: 'ECN without GUEST_ECN', fields: { gsoType: GsoType.TCPV4 | GsoType.ECN } },
    { name: 'a UDP tunnel', fields: { gsoType: GsoType.TCPV4 | GsoType.UDP_TUNNEL_IPV6 } },
    { name: 'a type without a number', fields: { gsoType: 31 } },
    { name: 'no checksum to fill', fields: { flags: 0 } },
    { name: 'a size of 0', fields: { gsoSize: 0 } },
    { name: 'a checksum outside', fields: { csumStart: 99 } },
  ])('is dropped with $name', ({ fields }) => {
    const q = open({ features, checksum: true });
    q.deliver(content(100), { ...tso, ...fields });
    expect(q.read()).toEqual([]);
    expect(q.rx.counters[RxCounter.droppedInvalid]).toBe(1);
  });
});

describe('a packet that stands for segments and was opened by the device', () => {
  it('has the SA that it came with, all its bytes and what it stands for', () => {
    const features = [Feature.GUEST_CSUM, Feature.GUEST_TSO4, Feature.MRG_RXBUF, Feature.IPSEC];
    const q = open({ features, checksum: true });
    q.sas.handle[7] = 70;
    const security = { resourceId: 7, resourceType: 0x204 };
    const tso = { flags: NEEDS_CSUM | SECURITY, gsoType: GsoType.TCPV4, gsoSize: 1448, csumStart: 34, csumOffset: 16 };
    q.deliver(content(900), { ...tso, ...security });
    // An SA that nobody made, and one that failed.
    q.deliver(content(901), { ...tso, ...security, resourceId: 8 });
    q.deliver(content(902), { ...tso, ...security, flags: tso.flags | NetHeaderFlag.SECURITY_ERR });
    const packets = q.burst();
    expect(packets.map((p) => q.pool.chainLength(p))).toEqual([900, 901, 902]);
    expect(packets.map((p) => q.pool.sa[p])).toEqual([70, 0, 0]);
    const large = PacketFlag.needsChecksum | PacketFlag.segmented;
    const { secured, securityError } = PacketFlag;
    expect(packets.map((p) => q.pool.flags[p])).toEqual([
      large | secured,
      large | securityError,
      large | securityError,
    ]);
  });
});

describe('a packet inside a UDP tunnel', () => {
  const BOTH = [Feature.GUEST_UDP_TUNNEL_GSO, Feature.GUEST_UDP_TUNNEL_GSO_CSUM];
  const features = [Feature.GUEST_CSUM, Feature.GUEST_TSO4, Feature.GUEST_TSO6, ...BOTH];
  const { UDP_TUNNEL_CSUM, DATA_VALID } = NetHeaderFlag;
  const tunnel: Partial<NetHeader> = {
    ...{ flags: NEEDS_CSUM | UDP_TUNNEL_CSUM, gsoType: GsoType.TCPV4 | GsoType.UDP_TUNNEL_IPV4, gsoSize: 1448 },
    ...{ csumStart: 84, csumOffset: 16, outerThOffset: 34, innerNhOffset: 64 },
  };

  it('tells where its headers are', () => {
    const q = open({ features, checksum: true });
    q.deliver(content(128), tunnel);
    q.deliver(content(127), { ...tunnel, flags: NEEDS_CSUM });
    const packets = q.burst();
    for (const p of packets) {
      expect(q.pool.gsoType[p]).toBe(tunnel.gsoType);
      expect([q.pool.outerTransport[p], q.pool.innerNetwork[p]]).toEqual([34, 64]);
    }
    const large = PacketFlag.needsChecksum | PacketFlag.segmented;
    expect(packets.map((p) => q.pool.flags[p])).toEqual([large | PacketFlag.outerChecksum, large]);
  });

  it.each<{ name: string; fields: Partial<NetHeader>; without?: number[] }>([
    { name: 'both tunnel types', fields: { gsoType: 0x61 } },
    { name: 'a checksum that is said to be valid', fields: { flags: NEEDS_CSUM | DATA_VALID } },
    { name: 'nothing inside', fields: { gsoType: GsoType.UDP_TUNNEL_IPV4 } },
    { name: 'UFO inside', fields: { gsoType: GsoType.UDP | GsoType.UDP_TUNNEL_IPV4 } },
    { name: 'an inner header in the outer one', fields: { innerNhOffset: 41 } },
    { name: 'an inner header behind the checksum', fields: { innerNhOffset: 84 } },
    { name: 'no tunnel but its checksum', fields: { gsoType: GsoType.TCPV4 } },
    { name: 'no tunnel, no segments, but its checksum', fields: { gsoType: 0, gsoSize: 0 } },
    { name: 'no feature for it', fields: {}, without: BOTH },
  ])('is dropped with $name', ({ fields, without = [] }) => {
    const q = open({ features: features.filter((bit) => !without.includes(bit)), checksum: true });
    q.deliver(content(100), { ...tunnel, ...fields });
    expect(q.read()).toEqual([]);
    expect(q.rx.counters[RxCounter.droppedInvalid]).toBe(1);
  });

  it('may have both checksums validated when it is one packet', () => {
    const q = open({ features, checksum: true });
    q.deliver(content(100), { flags: UDP_TUNNEL_CSUM | DATA_VALID });
    const [p] = q.burst();
    expect(q.pool.flags[p]).toBe(PacketFlag.checksumValid);
  });
});

describe('a queue that is reset in the middle of a packet', () => {
  it('gives its buffers back, and begins with a new packet', () => {
    const q = open();
    const whole = new Uint8Array(12 + ROOM);
    for (let round = 0; round < 3; round++) {
      encodeNetHeader(q.layout, Object.assign(new NetHeader(), { numBuffers: 3 }), whole, 0);
      q.receive(whole);
      q.receive(content(ROOM + 12));
      expect(q.burst()).toEqual([]);
      // As `NicRing.reset` does it: nothing is touched meanwhile, then everything comes back.
      q.rxRing.stop();
      expect(q.burst()).toEqual([]);
      q.rx.close();
      expect(q.pool.available).toBe(64);
      q.rxRing.restart();
      q.restartDevice();
      q.rx.refill(false);
      // What would have been the third buffer of the old packet is the first of another.
      q.deliver(content(60, round));
      const packets = q.burst();
      expect(packets.map((p) => [...q.pool.readChain(p)])).toEqual([[...content(60, round)]]);
      q.free(packets);
    }
    expect(q.rx.counters[RxCounter.droppedInvalid]).toBe(0);
  });
});

describe('the hash of a packet', () => {
  it.each([
    { name: 'without MRG_RXBUF', features: [Feature.HASH_REPORT] },
    { name: 'with MRG_RXBUF', features: [Feature.HASH_REPORT, Feature.MRG_RXBUF] },
    { name: 'with IPsec', features: [Feature.HASH_REPORT, Feature.MRG_RXBUF, Feature.IPSEC] },
  ])('is in the pool, $name', ({ features }) => {
    const q = open({ features });
    const hashes = [0x51ccc178, 0xffffffff, 0, 0x8000, 0x10000];
    for (const [i, hashValue] of hashes.entries()) {
      q.deliver(content(i === 3 && features.length > 1 ? 500 : 60, i), { hashValue, hashReport: i + 1 });
    }
    const packets = q.burst();
    expect(packets.map((p) => q.pool.hash[p])).toEqual(hashes);
    expect(packets.map((p) => q.pool.hashReport[p])).toEqual([1, 2, 3, 4, 5]);
  });
});

/** Large packets between two drivers of one software device, split and packed: whole, in UDP tunnels, under SAs, across the reset of a queue. */
import { afterEach, describe, expect, it } from 'vitest';
import { Feature, FeatureSet, type Nic, type NicOptions, openNic, PacketFlag } from '../../src/index.ts';
import { inTunnel, type Large, large } from '../device/helpers/large.ts';
import { udpFrame } from '../device/helpers/net-driver.ts';
import { atEnd, cleanUp, freshKey, startDevice, until } from './support.ts';

afterEach(cleanUp);

interface Got {
  readonly bytes: Uint8Array;
  readonly flags: number;
  readonly sa: number;
  readonly gsoType: number;
  readonly gsoSize: number;
  readonly slots: number;
}

async function pair(options: NicOptions, left: NicOptions = {}): Promise<[Nic, Nic]> {
  const device = await startDevice({ functions: 2 });
  const nics: Nic[] = [];
  for (const [i, address] of device.addresses.entries()) {
    const nic = await openNic(address, { ipsec: 'off', ...options, ...(i === 0 ? left : {}) });
    atEnd(() => nic.close());
    nics.push(nic);
  }
  return [nics[0], nics[1]];
}

/** A packet over as many slots as it needs, to be segmented. */
function make(nic: Nic, { frame, header }: Large, handle = 0): number {
  const { packets } = nic;
  const room = packets.stride - packets.headroom;
  const slots = new Uint32Array(Math.ceil(frame.length / room));
  expect(packets.allocate(slots, slots.length)).toBe(slots.length);
  for (const [i, p] of slots.entries()) {
    packets.write(p, frame.subarray(i * room, (i + 1) * room));
    if (i > 0) packets.next[slots[i - 1]] = p;
  }
  const [p] = slots;
  const outer = ((header.flags ?? 0) & 8) !== 0 ? PacketFlag.outerChecksum : 0;
  packets.flags[p] = PacketFlag.needsChecksum | PacketFlag.segmented | outer;
  packets.checksumStart[p] = header.csumStart ?? 0;
  packets.checksumOffset[p] = header.csumOffset ?? 0;
  packets.gsoType[p] = header.gsoType ?? 0;
  packets.gsoSize[p] = header.gsoSize ?? 0;
  packets.outerTransport[p] = header.outerThOffset ?? 0;
  packets.innerNetwork[p] = header.innerNhOffset ?? 0;
  packets.sa[p] = handle;
  return p;
}

async function send(nic: Nic, p: number): Promise<void> {
  const one = Uint32Array.of(p);
  await until(
    () => nic.queues[0].tx.burst(one, 1) === 1,
    () => 'the queue takes no packet',
  );
}

/** Takes what comes until there are `n`. */
async function receive(nic: Nic, n: number): Promise<Got[]> {
  const out = new Uint32Array(64);
  const got: Got[] = [];
  const { packets } = nic;
  await until(
    () => {
      const count = nic.queues[0].rx.burst(out, Math.min(out.length, n - got.length));
      for (const p of out.subarray(0, count)) {
        let slots = 0;
        for (let q = p; q < packets.count; q = packets.next[q]) slots++;
        const { flags, sa, gsoType, gsoSize } = packets;
        const about = { flags: flags[p], sa: sa[p], gsoType: gsoType[p], gsoSize: gsoSize[p] };
        got.push({ bytes: packets.readChain(p), slots, ...about });
      }
      packets.freeChains(out, count);
      return got.length >= n;
    },
    () => `${got.length} of ${n} packets came`,
  );
  return got;
}

const LARGE = PacketFlag.needsChecksum | PacketFlag.segmented;
const TCP = large({ version: 4, protocol: 'tcp', payload: 60000, size: 1448, options: 12 });

describe.each(['split', 'packed'] as const)('over %s rings, a packet of 60 KiB', (ring) => {
  it('comes as it was sent when the other driver takes it', async () => {
    const [left, right] = await pair({ ring, offloads: { largeReceive: true } });
    for (let round = 0; round < 20; round++) {
      await send(left, make(left, TCP));
      await send(left, make(left, large({ version: 6, protocol: 'udp', payload: 9000, size: 1000 })));
      const [first, second] = await receive(right, 2);
      expect(first).toMatchObject({ flags: LARGE, gsoType: 1, gsoSize: 1448 });
      expect(Buffer.compare(first.bytes, TCP.frame)).toBe(0);
      expect(first.slots).toBeGreaterThan(30);
      expect(second).toMatchObject({ flags: LARGE, gsoType: 5, gsoSize: 1000 });
    }
    const statistics = await right.control?.deviceStatistics(0);
    expect(statistics?.receiveSegmentation).toMatchObject({ packets: 40 });
    expect(right.statistics().rx.invalid).toBe(0);
  });

  it('is cut by the device when it does not, and its checksums are known to be good', async () => {
    const [left, right] = await pair({ ring });
    await send(left, make(left, TCP));
    const got = await receive(right, 42);
    expect(got.every(({ flags }) => flags === PacketFlag.checksumValid)).toBe(true);
    expect(Buffer.concat(got.map(({ bytes }) => bytes.subarray(66))).equals(TCP.payload)).toBe(true);
  });

  it('comes in a UDP tunnel', async () => {
    const [left, right] = await pair({ ring, offloads: { largeReceive: true, udpTunnels: true } });
    for (const checksum of [true, false]) {
      const packet = inTunnel(large({ version: 6, protocol: 'tcp', payload: 30000, size: 1300 }), {
        outer: 4,
        checksum,
      });
      await send(left, make(left, packet));
      const [got] = await receive(right, 1);
      expect(got.flags).toBe(LARGE | (checksum ? PacketFlag.outerChecksum : 0));
      expect(Buffer.compare(got.bytes, packet.frame)).toBe(0);
    }
  });

  it('that came can be sent on as it is', async () => {
    const [left, right] = await pair({ ring, offloads: { largeReceive: true } });
    await send(left, make(left, TCP));
    const out = new Uint32Array(1);
    await until(
      () => right.queues[0].rx.burst(out, 1) === 1,
      () => 'nothing came',
    );
    await send(right, out[0]);
    const [back] = await receive(left, 1);
    expect(back).toMatchObject({ flags: LARGE, gsoType: 1, gsoSize: 1448 });
    expect(Buffer.compare(back.bytes, TCP.frame)).toBe(0);
  });

  it('is lost as a whole, or not, when the queue that it is for is reset in the middle of traffic', async () => {
    const [left, right] = await pair({ ring, offloads: { largeReceive: true } });
    const free = right.packets.available;
    let sent = 0;
    for (let round = 0; round < 10; round++) {
      for (let i = 0; i < 3; i++, sent++)
        await send(left, make(left, large({ version: 4, protocol: 'tcp', payload: 20000, size: 1000, id: sent })));
      // Some of them were taken, of one perhaps only a part.
      const out = new Uint32Array(1);
      right.queues[0].rx.burst(out, 0);
      await right.queues[0].reset('rx');
      expect(right.broken).toBe(null);
      await send(left, make(left, TCP));
      let last: Got | undefined;
      for (let tries = 0; last?.bytes.length !== TCP.frame.length; tries++) {
        [last] = await receive(right, 1);
        // What comes is whole: its IP header says how long it is.
        expect(last.bytes.length).toBe(14 + ((last.bytes[16] << 8) | last.bytes[17]));
        expect(tries).toBeLessThan(10);
      }
      expect(Buffer.compare(last.bytes, TCP.frame)).toBe(0);
    }
    expect(right.statistics().rx.invalid).toBe(0);
    // What is missing in the ring is given to it later, in bursts.
    expect(right.packets.available).toBeGreaterThanOrEqual(free);
  });

  it.each(['software', 'inline'] as const)(
    'under an SA that is %s arrives as segments, each of them protected',
    async (where) => {
      const mode = where === 'inline' ? 'auto' : 'software';
      const [left, right] = await pair({ ring, ipsec: mode, offloads: { largeReceive: true } });
      const aead = { name: 'aes-gcm', key: freshKey(), salt: freshKey(4) } as const;
      const tunnel = { source: '192.0.2.1', destination: '192.0.2.2' };
      const sa = await left.ipsec.addSa({ direction: 'outbound', mode: 'tunnel', spi: 0x2000, aead, tunnel });
      const other = await right.ipsec.addSa({ direction: 'inbound', mode: 'tunnel', spi: 0x2000, aead, tunnel });
      expect([sa.placement.where, other.placement.where]).toEqual([where, where]);
      const packet = large({ version: 4, protocol: 'tcp', payload: 65535 - 52, size: 1360, options: 12 });
      const count = Math.ceil(packet.payload.length / 1360);
      await send(left, make(left, packet, sa.handle));
      const got = await receive(right, count);
      expect(got.every(({ sa: by, flags }) => by === other.handle && (flags & PacketFlag.secured) !== 0)).toBe(true);
      expect(Buffer.concat(got.map(({ bytes }) => bytes.subarray(66))).equals(packet.payload)).toBe(true);
      expect(sa.traffic().packets).toBe(BigInt(count));
      // What is not under the SA goes on as it was.
      await send(left, make(left, TCP));
      expect(Buffer.compare((await receive(right, 1))[0].bytes, TCP.frame)).toBe(0);
    },
  );
});

describe('a link with jumbo frames', () => {
  const jumbo = async (options: NicOptions): Promise<[Nic, Nic]> => {
    const device = await startDevice({ functions: 2, mtu: 9000 });
    const nics: Nic[] = [];
    for (const address of device.addresses) {
      const nic = await openNic(address, { ipsec: 'off', ...options });
      atEnd(() => nic.close());
      nics.push(nic);
    }
    return [nics[0], nics[1]];
  };
  const whole = (nic: Nic, bytes: Uint8Array, handle = 0): number => {
    const p = make(nic, { frame: bytes, header: {}, payload: bytes }, handle);
    nic.packets.flags[p] = 0;
    return p;
  };

  it.each<{ name: string; options: NicOptions; slots: number }>([
    { name: 'in slots that hold them', options: {}, slots: 1 },
    { name: 'over buffers that are merged', options: { offloads: { mergeBuffers: true } }, slots: 5 },
  ])('carries them, $name', async ({ options, slots }) => {
    const [left, right] = await jumbo(options);
    expect(left.mtu).toBe(9000);
    const frame = udpFrame(9014);
    for (let i = 0; i < 5; i++) await send(left, whole(left, frame));
    for (const got of await receive(right, 5)) {
      expect(Buffer.compare(got.bytes, frame)).toBe(0);
      expect(got.slots).toBe(slots);
    }
  });

  it('carries them under an SA in software, whether buffers may be merged or not', async () => {
    for (const mergeBuffers of [false, true]) {
      const [left, right] = await jumbo({ ipsec: 'software', offloads: { mergeBuffers } });
      const aead = { name: 'aes-gcm', key: freshKey(), salt: freshKey(4) } as const;
      const tunnel = { source: '192.0.2.1', destination: '192.0.2.2' };
      const sa = await left.ipsec.addSa({ direction: 'outbound', mode: 'tunnel', spi: 0x2000, aead, tunnel });
      const other = await right.ipsec.addSa({ direction: 'inbound', mode: 'tunnel', spi: 0x2000, aead, tunnel });
      const frame = udpFrame(8900);
      await send(left, whole(left, frame, sa.handle));
      const [got] = await receive(right, 1);
      expect(got.sa).toBe(other.handle);
      expect(Buffer.compare(got.bytes, frame)).toBe(0);
    }
  });
});

it('offloads that an application switches off are off', async () => {
  const [left, right] = await pair({ offloads: { largeReceive: true } });
  const packet = large({ version: 4, protocol: 'tcp', payload: 3000, size: 1000 });
  const { GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, GUEST_ECN } = Feature;
  const all = FeatureSet.of(GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, GUEST_ECN);
  await right.control?.setGuestOffloads(all.without(GUEST_TSO4));
  await send(left, make(left, packet));
  expect(await receive(right, 3)).toHaveLength(3);
  await right.control?.setGuestOffloads(all);
  await send(left, make(left, packet));
  expect(Buffer.compare((await receive(right, 1))[0].bytes, packet.frame)).toBe(0);
});

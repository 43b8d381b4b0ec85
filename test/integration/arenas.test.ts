import { closeSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import {
  createMemoryFile,
  Feature,
  type Nic,
  type NicOptions,
  NO_PACKET,
  openNic,
  type PacketArena,
} from '../../src/index.ts';
import { mapShared, unmapMemory } from '../../src/sys/memory.ts';
import { ProtocolFeature } from '../../src/virtio/vhost-user-protocol.ts';
import { cleanUp as endBackEnds, startBackEnd } from '../virtio/vhost-user/fake.ts';
import { cleanUp, freshKey, open, openPair, startDevice, until } from './support.ts';

const files: number[] = [];

afterEach(async () => {
  await cleanUp();
  await endBackEnds();
  for (const fd of files.splice(0)) closeSync(fd);
});

const ARENA_BYTES = 256 * 1024;

function memoryFile(size = ARENA_BYTES): number {
  const fd = createMemoryFile(size);
  files.push(fd);
  return fd;
}

const HEADERS = Uint8Array.from({ length: 34 }, (_, i) => (i === 12 ? 0x88 : i === 13 ? 0xb5 : 2));

/** Bytes of frame `n`'s payload, which are in one or several pieces, and where they are in the arena. */
function piecesOf(n: number): readonly (readonly [number, number])[] {
  return n % 3 === 0
    ? [[(n * 997) % 200_000, 26 + (n % 1400)]]
    : [
        [(n * 613) % 200_000, 100 + (n % 300)],
        [(n * 331) % 200_000, 1 + (n % 7)],
        [(n * 179) % 200_000, 500],
      ];
}

/** Sends `count` frames with payloads from `arena` through `from`, and checks them as they come out of `to`. */
async function exchange(from: Nic, to: Nic, arena: PacketArena, count: number): Promise<void> {
  const { u8 } = arena.memory;
  const packet = new Uint32Array(1);
  const arrived = new Uint32Array(32);
  const starts = new Uint32Array(64);
  const [{ tx }] = from.queues;
  const [{ rx }] = to.queues;
  let sent = 0;
  let received = 0;
  let collected = 0;
  const expected = (n: number) =>
    Buffer.concat([HEADERS, ...piecesOf(n).map(([at, size]) => u8.subarray(at, at + size))]);
  const send = () => {
    if (from.packets.allocate(packet, 1) === 0) return;
    from.packets.write(packet[0], HEADERS);
    let last = packet[0];
    for (const [at, size] of piecesOf(sent)) {
      const p = from.packets.refer(arena, at, size);
      expect(p).not.toBe(NO_PACKET);
      from.packets.next[last] = p;
      last = p;
    }
    if (tx.burst(packet, 1) === 1) sent++;
    else from.packets.freeChains(packet, 1);
  };
  const step = () => {
    // So few at a time that every receive ring has room for them.
    while (sent < count && sent - received < 16) {
      const before = sent;
      send();
      if (sent === before) break;
    }
    const n = rx.burst(arrived, arrived.length);
    for (let i = 0; i < n; i++) {
      expect(Buffer.from(to.packets.readChain(arrived[i])).equals(expected(received))).toBe(true);
      received++;
    }
    to.packets.freeChains(arrived, n);
    tx.reclaim();
    collected += arena.reclaim(starts);
    return received === count && arena.inFlight === 0;
  };
  await until(step, () => `${received} of ${count} frames, ${sent} sent; broken: ${from.broken} ${to.broken}`);
  collected += arena.reclaim(starts);
  expect(collected).toBe(Array.from({ length: count }, (_, n) => piecesOf(n).length).reduce((a, b) => a + b, 0));
}

function fill(arena: PacketArena): void {
  for (let i = 0; i < arena.memory.size; i++) arena.memory.u8[i] = (i * 7 + (i >>> 8)) & 0xff;
}

const KINDS: readonly (readonly [string, NicOptions])[] = [
  ['split rings', { ring: 'split' }],
  ['split rings without indirect descriptors', { ring: 'split', decline: [Feature.INDIRECT_DESC] }],
  ['packed rings', { ring: 'packed' }],
  ['packed rings without indirect descriptors', { ring: 'packed', decline: [Feature.INDIRECT_DESC] }],
];

describe('memory of the application, sent by a vfio-user device', () => {
  it.each(KINDS)('arrives as it is, over %s, and comes back', async (_, options) => {
    const { a, b } = await openPair({ nic: { ...options, ipsec: 'off' } }, { nic: { ipsec: 'off' } });
    const arena = a.registerMemory(memoryFile(), 0, ARENA_BYTES);
    fill(arena);
    await exchange(a, b, arena, 300);
    a.unregisterMemory(arena);
    a.unregisterMemory(arena);
    expect(arena.memory.u8[1]).toBe(0);
    expect(() => a.packets.refer(arena, 0, 1)).toThrow(RangeError);
    // The device lets go of it, and takes it again.
    const again = a.registerMemory(files[0], 4096, 4096);
    expect(again.memory.u8[0]).toBe(16);
  });

  it('is refused where it cannot be, with the reason, and the NIC goes on', async () => {
    const { a, b } = await openPair({ nic: { ipsec: 'off' } }, { nic: { ipsec: 'off' } });
    const fd = memoryFile();
    const code = (name: string) => expect.objectContaining({ code: name });
    expect(() => a.registerMemory(fd, 5, 4096)).toThrow(code('DMA_RANGE'));
    expect(() => a.registerMemory(fd, 0, ARENA_BYTES + 4096)).toThrow(code('DMA_RANGE'));
    expect(() => a.registerMemory(-1, 0, 4096)).toThrow(code('DMA_SEAL'));
    const arena = a.registerMemory(fd, 0, ARENA_BYTES);
    expect(() => a.registerMemory(fd, 4096, 4096)).toThrow(code('DMA_OVERLAP'));
    fill(arena);
    const packet = new Uint32Array(1);
    a.packets.allocate(packet, 1);
    a.packets.next[packet[0]] = a.packets.refer(arena, 0, 100);
    expect(() => a.unregisterMemory(arena)).toThrow(code('ARENA_BUSY'));
    a.packets.freeChains(packet, 1);
    arena.reclaim(packet);
    await exchange(a, b, arena, 40);
    await a.close();
    expect(() => a.registerMemory(fd, 0, ARENA_BYTES)).toThrow(code('NIC_CLOSED'));
    a.unregisterMemory(arena);
  });

  it('comes back with a packet that its SA in software cannot carry', async () => {
    const { a } = await openPair({ ipsec: false, nic: { ipsec: 'software' } });
    const sa = await a.ipsec.addSa({
      mode: 'tunnel',
      protocol: 'esp',
      direction: 'outbound',
      spi: 0x1001,
      aead: { name: 'aes-gcm', key: freshKey(), salt: '01020304', icvLength: 16 },
      tunnel: { source: '192.0.2.1', destination: '192.0.2.2', ttl: 64 },
    });
    const arena = a.registerMemory(memoryFile(), 0, ARENA_BYTES);
    const free = a.packets.available;
    const packet = new Uint32Array(1);
    a.packets.allocate(packet, 1);
    a.packets.write(packet[0], HEADERS);
    a.packets.sa[packet[0]] = sa.handle;
    a.packets.next[packet[0]] = a.packets.refer(arena, 64, 100);
    expect(a.queues[0].tx.burst(packet, 1)).toBe(1);
    expect(a.statistics().tx.packets).toBe(0);
    expect(Object.values(a.statistics().tx.dropped)).toEqual([1]);
    expect(a.packets.available).toBe(free);
    expect(arena.reclaim(packet)).toBe(1);
    expect(packet[0]).toBe(64);
  });
});

describe('memory of the application, sent through a vhost-user port', () => {
  it.each([
    ['a table of regions', [ProtocolFeature.REPLY_ACK]],
    ['memory slots', [ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIGURE_MEM_SLOTS]],
  ])('arrives as it is with %s, though the rings were running before it was registered', async (_, protocol) => {
    const features = [Feature.VERSION_1, Feature.INDIRECT_DESC];
    const backEnd = await startBackEnd({ process: true, device: { loop: true, features, protocol } });
    const nic = await open(`vhost-user:${backEnd.path}`, { ipsec: 'off' });
    for (let round = 0; round < 2; round++) {
      const arena = nic.registerMemory(memoryFile(), 0, ARENA_BYTES);
      fill(arena);
      await exchange(nic, nic, arena, 100);
      nic.unregisterMemory(arena);
    }
    await nic.close();
    await backEnd.settled();
    expect(backEnd.violations).toEqual([]);
  });

  it('is refused when the back-end takes no more regions', async () => {
    const backEnd = await startBackEnd({ process: true, device: { loop: true, features: [Feature.VERSION_1] } });
    const nic = await open(`vhost-user:${backEnd.path}`, { ipsec: 'off' });
    const registered: PacketArena[] = [];
    const more = () => {
      for (let i = 0; i < 8; i++) registered.push(nic.registerMemory(memoryFile(4096), 0, 4096));
    };
    expect(more).toThrow(expect.objectContaining({ code: 'DMA_EXHAUSTED' }));
    expect(registered.length).toBeGreaterThan(0);
    fill(registered[0]);
    const last = registered.at(-1);
    if (last !== undefined) nic.unregisterMemory(last);
    nic.registerMemory(memoryFile(4096), 0, 4096);
    expect(nic.broken).toBeNull();
  });
});

describe('packets in memory of the application', () => {
  const size = 1 << 20;

  it.each(['split', 'packed'] as const)('arrive there without a copy, and are wiped in the end, %s', async (ring) => {
    const fd = memoryFile(2 * size);
    const view = mapShared(fd, 0, 2 * size, { write: true });
    const packetMemory = { fd, offset: size, size };
    const options: NicOptions = { ring, queueSize: 64, ipsec: 'off' };
    const { a, b } = await openPair({ nic: { ...options, packetMemory } }, { nic: options });
    expect(a.packets.count).toBe(Math.floor(size / a.packets.stride));
    const frame = Uint8Array.from({ length: 777 }, (_, i) => (i < 12 ? 2 : i & 0xff));
    const packets = new Uint32Array(8);
    b.packets.allocate(packets, 1);
    b.packets.write(packets[0], frame);
    expect(b.queues[0].tx.burst(packets, 1)).toBe(1);
    await until(
      () => a.queues[0].rx.burst(packets, 8) === 1,
      () => 'nothing arrived',
    );
    const at = size + a.packets.offset[packets[0]];
    expect(view.u8.slice(at, at + 777)).toEqual(frame);
    expect(a.packets.length[packets[0]]).toBe(777);
    await a.close();
    expect(view.u8.subarray(size).every((byte) => byte === 0)).toBe(true);
    unmapMemory(view);
  });

  it.each<[string, NicOptions['packetMemory']]>([
    ['NIC_OPTION', { fd: -1, offset: 0, size: 4096 }],
    ['NIC_OPTION', { fd: -1, offset: 0, size: 2 ** 31 + 4096 }],
    ['DMA_SEAL', { fd: -1, offset: 0, size }],
  ])('are refused with %s when the memory is not fit for it', async (code, packetMemory) => {
    const device = await startDevice();
    const opening = openNic(device.addresses[0], { queueSize: 64, ...(packetMemory && { packetMemory }) });
    await expect(opening).rejects.toMatchObject({ code });
    const nic = await open(device.addresses[0], { queueSize: 64 });
    expect(nic.packets.count).toBe(512);
  });
});

describe('an application that takes all packets it can get', () => {
  it('still receives, and is told by numbers and counters, not by errors', async () => {
    const { a, b } = await openPair({ nic: { ipsec: 'off', packets: 512, queueSize: 64 } }, { nic: { ipsec: 'off' } });
    const held = new Uint32Array(512);
    const taken = a.packets.allocate(held, 512);
    expect(taken).toBe(512 - 64 - a.statistics().pool.reserve);
    expect(a.packets.allocate(held.subarray(taken), 1)).toBe(0);
    expect(a.statistics().pool).toEqual({ packets: 512, free: 64, reserve: 64, exhausted: 2 });
    const packets = new Uint32Array(32);
    let received = 0;
    let sent = 0;
    const step = () => {
      const n = b.packets.allocate(packets, Math.min(16 - (sent - received), 1000 - sent));
      for (let i = 0; i < n; i++) b.packets.write(packets[i], HEADERS);
      sent += b.queues[0].tx.burst(packets, n);
      const arrived = a.queues[0].rx.burst(packets, 32);
      a.packets.free(packets, arrived);
      received += arrived;
      return received === 1000;
    };
    await until(step, () => `${received} of ${sent} frames`);
    expect(a.statistics().rx.poolExhausted).toBe(0);
  });

  it('hears of what comes once it has given packets back, though it held so many that the ring was empty', async () => {
    const { a, b } = await openPair({ nic: { ipsec: 'off', packets: 128, queueSize: 64 } }, { nic: { ipsec: 'off' } });
    const [{ rx }] = a.queues;
    rx.policy = 'interrupt';
    const held: number[] = [];
    held.push(...takeAll(a));
    const packets = new Uint32Array(32);
    const send = (n: number) => {
      const made = b.packets.allocate(packets, n);
      for (let i = 0; i < made; i++) b.packets.write(packets[i], HEADERS);
      expect(b.queues[0].tx.burst(packets, made)).toBe(n);
    };
    // Until neither the ring nor the pool has any left.
    const drain = () => {
      const n = rx.burst(packets, 32);
      held.push(...packets.subarray(0, n));
      if (n === 0 && a.packets.available === 0 && held.length >= 128) return true;
      b.queues[0].tx.reclaim();
      if (b.queues[0].tx.room > 200) send(4);
      return false;
    };
    await until(drain, () => `${held.length} held, ${a.packets.available} free`);
    expect(a.statistics().rx.poolExhausted).toBeGreaterThan(0);
    a.packets.free(Uint32Array.from(held), held.length);
    const woken = rx.wait(10_000);
    await until(
      () => {
        b.queues[0].tx.reclaim();
        return b.queues[0].tx.room === 256;
      },
      () => 'the other side does not get its packets back',
    );
    send(1);
    expect(await woken).toBe(true);
  });
});

function takeAll(nic: Nic): number[] {
  const out = new Uint32Array(nic.packets.count);
  return [...out.subarray(0, nic.packets.allocate(out, out.length))];
}

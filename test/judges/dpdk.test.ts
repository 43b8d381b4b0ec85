/**
 * Our driver at the vhost-user ports of DPDK's vhost library, which OVS-DPDK uses too: frames go there and come back with their
 * addresses swapped, and testpmd counts as many as we do.
 */
import { closeSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Testpmd } from '../../bench/testpmd.ts';
import {
  createMemoryFile,
  Feature,
  type FeatureBit,
  type Nic,
  type NicOptions,
  openNic,
  RxCounter,
} from '../../src/index.ts';

let folder = '';
const endings: (() => Promise<void>)[] = [];
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-dpdk-'));
});
afterEach(async () => {
  for (const end of endings.splice(0).reverse()) await end();
  rmSync(folder, { recursive: true, force: true });
});

async function testpmd(device: string, args: readonly string[] = []): Promise<Testpmd> {
  const started = await Testpmd.start({
    folder,
    devices: [device],
    megabytes: 96,
    args: ['--forward-mode=macswap', '--auto-start', ...args],
  });
  // Last of all: NICs are closed while there still is a device.
  endings.unshift(() => started.quit());
  return started;
}

async function open(address: string, options: NicOptions): Promise<Nic> {
  const nic = await openNic(address, options);
  endings.push(() => nic.close());
  return nic;
}

/**
 * A NIC and a testpmd that connects to it: the other way round DPDK looks at the new connection after a second only. `device` and
 * `args` are further arguments of the device and of testpmd.
 */
async function pair(
  options: NicOptions,
  device = '',
  args: readonly string[] = [],
): Promise<{ nic: Nic; judge: Testpmd }> {
  const path = join(folder, 'port.sock');
  const [nic, judge] = await Promise.all([
    open(`vhost-user:${path},server=1`, options),
    // Frames that are there before it begins are not to be thrown away.
    testpmd(`net_vhost0,iface=${path},client=1${device}`, ['--no-flush-rx', ...args]),
  ]);
  return { nic, judge };
}

const DESTINATION = [2, 0, 0, 0, 0, 1];
const SOURCE = [2, 0, 0, 0, 0, 2];

const CONTENT = Buffer.from(Array.from({ length: 16_384 }, (_, i) => (i * 7) & 0xff));

/** An Ethernet frame of an experimental type, whose content tells its number. */
function frame(number: number, length: number, swapped = false): Uint8Array {
  const bytes = Buffer.from(CONTENT.subarray(number % 251, (number % 251) + length));
  bytes.set(swapped ? SOURCE : DESTINATION, 0);
  bytes.set(swapped ? DESTINATION : SOURCE, 6);
  bytes.writeUInt16BE(0x88b5, 12);
  bytes.writeUInt16BE(number, 14);
  return bytes;
}

/** How long the frames of a run are: from the shortest to the longest, each length only a few times. */
const lengthOf = (i: number, longest: number): number => 60 + ((i * 53) % (longest - 59));

/** A packet, or a chain of packets, that holds `bytes`. */
function chainOf(nic: Nic, bytes: Uint8Array): number {
  const { packets: pool } = nic;
  const room = pool.stride - pool.headroom;
  const pieces = new Uint32Array(Math.ceil(bytes.length / room));
  expect(pool.allocate(pieces, pieces.length)).toBe(pieces.length);
  for (const [i, piece] of pieces.entries()) {
    pool.write(piece, bytes.subarray(i * room, (i + 1) * room));
    if (i > 0) pool.next[pieces[i - 1]] = piece;
  }
  return pieces[0];
}

/** Sends `count` frames, no more than `window` at a time, and checks each that comes back. */
async function exchange(nic: Nic, count: number, longest = 1514, queue = 0, window = 32): Promise<void> {
  const { rx, tx } = nic.queues[queue];
  const pool = nic.packets;
  const packets = new Uint32Array(64);
  const deadline = performance.now() + 60_000;
  let sent = 0;
  let received = 0;
  while (received < count) {
    const n = Math.min(window - (sent - received), count - sent);
    for (let i = 0; i < n; i++) packets[i] = chainOf(nic, frame(sent + i, lengthOf(sent + i, longest)));
    const taken = tx.burst(packets, n);
    pool.freeChains(packets.slice(taken, n), n - taken);
    sent += taken;
    const arrived = rx.burst(packets, 64);
    for (let i = 0; i < arrived; i++) {
      const expected = Buffer.from(frame(received, lengthOf(received, longest), true));
      const got = Buffer.from(pool.readChain(packets[i]));
      if (!got.equals(expected)) expect(`frame ${received}: ${got.toString('hex')}`).toBe(expected.toString('hex'));
      received++;
    }
    pool.freeChains(packets, arrived);
    if (nic.broken !== null) throw nic.broken;
    if (performance.now() > deadline) throw new Error(`${received} of ${sent} frames came back`);
    if (arrived === 0) await new Promise((resolve) => setImmediate(resolve));
  }
}

interface Case {
  readonly ring: 'split' | 'packed';
  readonly inOrder: boolean;
  readonly mergeBuffers: boolean;
}

const CASES: Case[] = (['split', 'packed'] as const).flatMap((ring) =>
  [false, true].flatMap((inOrder) => [false, true].map((mergeBuffers) => ({ ring, inOrder, mergeBuffers }))),
);

describe("DPDK's vhost device", () => {
  it.each(CASES)('sends every frame back: $ring rings, in order $inOrder, mergeable $mergeBuffers', async (one) => {
    const decline: FeatureBit[] = one.inOrder ? [] : [Feature.IN_ORDER];
    const { mergeBuffers, ring } = one;
    const { nic, judge } = await pair({ ring, decline, offloads: { mergeBuffers } });
    expect(nic.features.has(Feature.RING_PACKED)).toBe(one.ring === 'packed');
    expect(nic.features.has(Feature.IN_ORDER)).toBe(one.inOrder);
    expect(nic.features.has(Feature.MRG_RXBUF)).toBe(one.mergeBuffers);
    // Each length twice, and a dozen times around the rings.
    const count = 3000;
    await exchange(nic, count);
    expect(await judge.statistics()).toEqual({ received: count, sent: count });
    expect(nic.queues[0].rx.counters[RxCounter.packets]).toBe(count);
  });

  it.each(['split', 'packed'] as const)('spreads jumbo frames over buffers on both ways, %s', async (ring) => {
    const options = { ring, mtu: 9000, packetStride: 2048, offloads: { mergeBuffers: true } };
    const args = ['--max-pkt-len=9018', '--mbuf-size=10240', '--total-num-mbufs=4096'];
    const { nic, judge } = await pair(options, '', args);
    await exchange(nic, 1000, 9000, 0, 8);
    expect(await judge.statistics()).toEqual({ received: 1000, sent: 1000 });
  });

  it.each(['split', 'packed'] as const)('sends memory that was registered while the rings ran, %s', async (ring) => {
    const { nic, judge } = await pair({ ring });
    await exchange(nic, 500);
    const bytes = 1 << 20;
    const fd = createMemoryFile(bytes);
    const arena = nic.registerMemory(fd, 0, bytes);
    closeSync(fd);
    arena.memory.u8.set(CONTENT, 4096);
    const packets = new Uint32Array(64);
    const [{ rx, tx }] = nic.queues;
    const count = 500;
    let sent = 0;
    let received = 0;
    const deadline = performance.now() + 60_000;
    while (received < count) {
      while (sent < count && sent - received < 32) {
        nic.packets.allocate(packets, 1);
        nic.packets.write(packets[0], frame(sent, 60));
        nic.packets.next[packets[0]] = nic.packets.refer(arena, 4096 + sent, 900 + (sent % 500));
        expect(tx.burst(packets, 1)).toBe(1);
        sent++;
      }
      const arrived = rx.burst(packets, 64);
      for (let i = 0; i < arrived; i++, received++) {
        const tail = CONTENT.subarray(received, received + 900 + (received % 500));
        const expected = Buffer.concat([frame(received, 60, true), tail]);
        expect(Buffer.from(nic.packets.readChain(packets[i])).equals(expected), `frame ${received}`).toBe(true);
      }
      nic.packets.freeChains(packets, arrived);
      tx.reclaim();
      arena.reclaim(packets);
      if (performance.now() > deadline) throw new Error(`${received} of ${sent} frames came back`);
      if (arrived === 0) await new Promise((resolve) => setImmediate(resolve));
    }
    await exchange(nic, 500);
    expect(await judge.statistics()).toEqual({ received: 1500, sent: 1500 });
    tx.reclaim();
    nic.unregisterMemory(arena);
    await exchange(nic, 500);
  });

  it.each(['split', 'packed'] as const)('has several queue pairs, %s', async (ring) => {
    const { nic, judge } = await pair({ ring, queuePairs: 2 }, ',queues=2', ['--rxq=2', '--txq=2', '--nb-cores=1']);
    for (const queue of [0, 1]) await exchange(nic, 2000, 1514, queue);
    expect(nic.queues.map(({ rx }) => rx.counters[RxCounter.packets])).toEqual([2000, 2000]);
    expect(await judge.statistics()).toEqual({ received: 4000, sent: 4000 });
  });

  it.each(['split', 'packed'] as const)('wakes who waits for frames, at once and each time, %s', async (ring) => {
    const { nic } = await pair({ ring });
    const [{ rx, tx }] = nic.queues;
    rx.policy = 'interrupt';
    const packets = new Uint32Array(4);
    const times: number[] = [];
    for (let i = 0; i < 50; i++) {
      // Asleep before the frame is on its way.
      const woken = rx.wait(5000);
      await new Promise((resolve) => setTimeout(resolve, 2));
      nic.packets.allocate(packets, 1);
      nic.packets.write(packets[0], frame(i, 60));
      const began = performance.now();
      expect(tx.burst(packets, 1)).toBe(1);
      expect(await woken).toBe(true);
      times.push(performance.now() - began);
      expect(rx.burst(packets, 4)).toBe(1);
      nic.packets.free(packets, 1);
    }
    // One who missed the interrupt would look again after 100 ms only.
    expect(times.sort((a, b) => a - b)[25]).toBeLessThan(30);
  });

  it.each(['split', 'packed'] as const)('may be the one that listens, %s', async (ring) => {
    const path = join(folder, 'port.sock');
    const judge = await testpmd(`net_vhost0,iface=${path}`);
    const nic = await open(`vhost-user:${path}`, { ring });
    await exchange(nic, 1000);
    expect(await judge.statistics()).toEqual({ received: 1000, sent: 1000 });
  });

  it('takes a NIC again after it was closed, and says goodbye when it goes itself', async () => {
    const path = join(folder, 'port.sock');
    const judge = await testpmd(`net_vhost0,iface=${path}`);
    for (const ring of ['split', 'packed', 'split'] as const) {
      const nic = await openNic(`vhost-user:${path}`, { ring });
      try {
        await exchange(nic, 500);
      } finally {
        await nic.close();
      }
    }
    const nic = await open(`vhost-user:${path}`, {});
    const broken = new Promise<Error>((resolve) => nic.onBroken(resolve));
    await judge.kill();
    expect(await broken).toMatchObject({ code: 'DEVICE_GONE' });
    expect(nic.queues[0].tx.burst(new Uint32Array(1), 1)).toBe(0);
  });

  it('carries what software IPsec has protected, and brings it back to be opened', async () => {
    const { nic } = await pair({});
    const sa = {
      mode: 'tunnel',
      spi: 0xdead,
      aead: { name: 'aes-gcm', key: '000102030405060708090a0b0c0d0e0f', salt: 'cafebabe', icvLength: 16 },
      tunnel: { source: '192.0.2.1', destination: '192.0.2.2' },
    } as const;
    const inbound = await nic.ipsec.addSa({ ...sa, protocol: 'esp', direction: 'inbound' });
    const outbound = await nic.ipsec.addSa({ ...sa, protocol: 'esp', direction: 'outbound' });
    expect(outbound.placement.where).toBe('software');
    const inner = Buffer.from(`450000280001000040110000c0a80001c0a80002${'5a'.repeat(20)}`, 'hex');
    const sent = Buffer.concat([Buffer.from([...DESTINATION, ...SOURCE, 8, 0]), inner]);
    const { packets: pool, queues } = nic;
    const packets = new Uint32Array(64);
    const deadline = performance.now() + 20_000;
    let received = 0;
    for (let given = 0; received < 1000; ) {
      const n = pool.allocate(packets, Math.min(32 - (given - received), 1000 - given));
      for (let i = 0; i < n; i++) {
        pool.write(packets[i], sent);
        pool.sa[packets[i]] = outbound.handle;
      }
      const taken = queues[0].tx.burst(packets, n);
      pool.free(packets.slice(taken, n), n - taken);
      given += taken;
      const arrived = queues[0].rx.burst(packets, 64);
      for (let i = 0; i < arrived; i++) {
        expect(pool.sa[packets[i]]).toBe(inbound.handle);
        expect(Buffer.from(pool.read(packets[i])).subarray(14)).toEqual(inner);
      }
      received += arrived;
      pool.free(packets, arrived);
      if (performance.now() > deadline) throw new Error(`${received} of ${given} packets came back`);
      if (arrived === 0) await new Promise((resolve) => setImmediate(resolve));
    }
  });
});

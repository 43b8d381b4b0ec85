/**
 * Our driver at the vhost-user ports of DPDK's vhost library, which OVS-DPDK uses too: frames go there and come back with their
 * addresses swapped, and testpmd counts as many as we do.
 */
import { closeSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
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

/** One testpmd is the judge of most tests: to start it takes longer than most of them, and it polls all the time that it forwards. */
const FORWARDING = ['--forward-mode=macswap', '--no-flush-rx', '--nb-cores=1'];
/** For every test: two queues, and room for jumbo frames. */
const PORT = ['--rxq=2', '--txq=2', '--max-pkt-len=9018', '--mbuf-size=10240', '--total-num-mbufs=4096'];

const folder = mkdtempSync(join(tmpdir(), 'vipsec-dpdk-'));
const path = join(folder, 'port.sock');
const endings: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const end of endings.splice(0)) await end();
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function testpmd(device: string, args: readonly string[]): Promise<Testpmd> {
  return Testpmd.start({ folder, devices: [device], megabytes: 96, args: [...FORWARDING, ...args] });
}

/** Lets it forward. It polls all the time: not while we open, therefore. */
async function start(judge: Testpmd): Promise<void> {
  await judge.command('start', /forwards packets on/);
}

async function stop(judge: Testpmd): Promise<void> {
  await judge.command('stop', /\nDone\.\n/);
}

async function open(address: string, options: NicOptions): Promise<Nic> {
  const nic = await openNic(address, options);
  // The device still forwards when the NIC goes.
  endings.unshift(() => nic.close());
  return nic;
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
  if (pool.allocate(pieces, pieces.length) !== pieces.length) throw new Error('no free packets');
  for (const [i, piece] of pieces.entries()) {
    pool.write(piece, bytes.subarray(i * room, (i + 1) * room));
    if (i > 0) pool.next[pieces[i - 1]] = piece;
  }
  return pieces[0];
}

/** How often in turn nothing may have come before a test sleeps: on a busy machine the other side is waiting for a core. */
const TURNS = 100;

function pause(turn: number): Promise<void> {
  return new Promise((resolve) => (turn < TURNS ? setImmediate(resolve) : setTimeout(resolve, 1)));
}

/** Sends `count` frames, no more than `window` at a time, and checks each that comes back. */
async function exchange(nic: Nic, count: number, longest = 1514, queue = 0, window = 128): Promise<void> {
  const { rx, tx } = nic.queues[queue];
  const pool = nic.packets;
  const packets = new Uint32Array(64);
  const deadline = performance.now() + 60_000;
  let sent = 0;
  let received = 0;
  for (let idle = 0; received < count; ) {
    const n = Math.min(window - (sent - received), count - sent, packets.length);
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
    idle = arrived === 0 ? idle + 1 : 0;
    if (idle > 0) await pause(idle);
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

describe("DPDK's vhost device, which listens", () => {
  let judge: Testpmd;
  beforeAll(async () => {
    judge = await testpmd(`net_vhost0,iface=${path},queues=2`, PORT);
  });
  afterAll(() => judge.quit());

  /** A NIC at the port, and the judge forwards. */
  async function attach(options: NicOptions): Promise<Nic> {
    const nic = await open(`vhost-user:${path}`, options);
    await judge.command('clear port stats all', /cleared\n/);
    await start(judge);
    endings.push(() => stop(judge));
    return nic;
  }

  it.each(CASES)('sends every frame back: $ring rings, in order $inOrder, mergeable $mergeBuffers', async (one) => {
    const decline: FeatureBit[] = one.inOrder ? [] : [Feature.IN_ORDER];
    const { mergeBuffers, ring } = one;
    const nic = await attach({ ring, decline, offloads: { mergeBuffers } });
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
    const nic = await attach(options);
    await exchange(nic, 1000, 9000, 0, 32);
    expect(await judge.statistics()).toEqual({ received: 1000, sent: 1000 });
  });

  it.each(['split', 'packed'] as const)('sends memory that was registered while the rings ran, %s', async (ring) => {
    const nic = await attach({ ring });
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
    for (let idle = 0; received < count; ) {
      while (sent < count && sent - received < 64) {
        nic.packets.allocate(packets, 1);
        nic.packets.write(packets[0], frame(sent, 60));
        nic.packets.next[packets[0]] = nic.packets.refer(arena, 4096 + sent, 900 + (sent % 500));
        if (tx.burst(packets, 1) !== 1) throw new Error('the ring is full');
        sent++;
      }
      const arrived = rx.burst(packets, 64);
      for (let i = 0; i < arrived; i++, received++) {
        const tail = CONTENT.subarray(received, received + 900 + (received % 500));
        const expected = Buffer.concat([frame(received, 60, true), tail]);
        if (!expected.equals(nic.packets.readChain(packets[i]))) expect(`frame ${received}`).toBe('as it was sent');
      }
      nic.packets.freeChains(packets, arrived);
      tx.reclaim();
      arena.reclaim(packets);
      if (performance.now() > deadline) throw new Error(`${received} of ${sent} frames came back`);
      idle = arrived === 0 ? idle + 1 : 0;
      if (idle > 0) await pause(idle);
    }
    await exchange(nic, 500);
    expect(await judge.statistics()).toEqual({ received: 1500, sent: 1500 });
    tx.reclaim();
    nic.unregisterMemory(arena);
    await exchange(nic, 500);
  });

  it.each(['split', 'packed'] as const)('has several queue pairs, %s', async (ring) => {
    const nic = await attach({ ring, queuePairs: 2 });
    for (const queue of [0, 1]) await exchange(nic, 2000, 1514, queue);
    expect(nic.queues.map(({ rx }) => rx.counters[RxCounter.packets])).toEqual([2000, 2000]);
    expect(await judge.statistics()).toEqual({ received: 4000, sent: 4000 });
  });

  it.each(['split', 'packed'] as const)('wakes who waits for frames, at once and each time, %s', async (ring) => {
    const nic = await attach({ ring });
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
    // One who missed the interrupt would look again after 100 ms only; on a busy machine 35 ms were seen.
    expect(times.sort((a, b) => a - b)[25]).toBeLessThan(80);
  });

  it('carries what software IPsec has protected, and brings it back to be opened', async () => {
    const nic = await attach({});
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
    for (let given = 0, idle = 0; received < 1000; ) {
      const n = pool.allocate(packets, Math.min(64 - (given - received), 1000 - given));
      for (let i = 0; i < n; i++) {
        pool.write(packets[i], sent);
        pool.sa[packets[i]] = outbound.handle;
      }
      const taken = queues[0].tx.burst(packets, n);
      pool.free(packets.slice(taken, n), n - taken);
      given += taken;
      const arrived = queues[0].rx.burst(packets, 64);
      for (let i = 0; i < arrived; i++) {
        const opened = Buffer.from(pool.read(packets[i])).subarray(14);
        if (!opened.equals(inner)) expect(opened.toString('hex')).toBe(inner.toString('hex'));
        if (pool.sa[packets[i]] !== inbound.handle) expect(pool.sa[packets[i]]).toBe(inbound.handle);
      }
      received += arrived;
      pool.free(packets, arrived);
      if (performance.now() > deadline) throw new Error(`${received} of ${given} packets came back`);
      idle = arrived === 0 ? idle + 1 : 0;
      if (idle > 0) await pause(idle);
    }
  });

  it('says goodbye when it goes itself', async () => {
    const nic = await attach({});
    await exchange(nic, 500);
    // It will not answer any more.
    endings.pop();
    await goesAway(nic, judge);
  });
});

/** Kills the device, and sees that the NIC learns of it. */
async function goesAway(nic: Nic, judge: Testpmd): Promise<void> {
  const broken = new Promise<Error>((resolve) => nic.onBroken(resolve));
  await judge.kill();
  expect(await broken).toMatchObject({ code: 'DEVICE_GONE' });
  expect(nic.queues[0].tx.burst(new Uint32Array(1), 1)).toBe(0);
}

describe("DPDK's vhost device, which connects to us", () => {
  it('takes a NIC again after it was closed, and says goodbye when it goes itself', async () => {
    const iface = join(folder, 'ours.sock');
    const judge = await testpmd(`net_vhost0,iface=${iface},client=1`, []);
    try {
      for (const ring of ['split', 'packed', 'split'] as const) {
        const nic = await openNic(`vhost-user:${iface},server=1`, { ring });
        try {
          await start(judge);
          await exchange(nic, 500);
        } finally {
          await nic.close();
        }
        await stop(judge);
      }
      expect(await judge.statistics()).toEqual({ received: 1500, sent: 1500 });
      await goesAway(await open(`vhost-user:${iface},server=1`, {}), judge);
    } finally {
      await judge.kill();
    }
  });
});

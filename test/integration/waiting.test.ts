import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import type { FaultName } from '../../src/device/index.ts';
import type { Nic, NicLink, WaitPolicy } from '../../src/index.ts';
import { capture, cleanUp, open, openPair, send, spawnDevice, startDevice, until } from './support.ts';

afterEach(cleanUp);

const frames = capture('http-ipv4');
const POLICIES: readonly WaitPolicy[] = ['poll', 'interrupt', 'adaptive'];

/** Takes all packets that come through `wait` until there are `count`. */
async function takeWaiting(nic: Nic, count: number): Promise<Buffer[]> {
  const [{ rx }] = nic.queues;
  const packets = new Uint32Array(64);
  const out: Buffer[] = [];
  while (out.length < count && (await rx.wait(5000))) {
    const n = rx.burst(packets, 64);
    for (let i = 0; i < n; i++) out.push(Buffer.from(nic.packets.read(packets[i])));
    nic.packets.free(packets, n);
  }
  return out;
}

describe('waiting for packets', () => {
  it.each(POLICIES)(
    'gives them all, one by one and many at once, and time is up when none comes: %s',
    async (policy) => {
      const device = await startDevice();
      const nic = await open(device.addresses[0]);
      nic.queues[0].rx.policy = policy;
      const arrived = takeWaiting(nic, 20 + frames.length);
      for (const frame of frames.slice(0, 20)) {
        await send(nic, [frame], null);
        await sleep(2);
      }
      await send(nic, frames, null);
      expect(await arrived).toEqual([...frames.slice(0, 20), ...frames]);
      const start = performance.now();
      expect(await nic.queues[0].rx.wait(60)).toBe(false);
      expect(performance.now() - start).toBeGreaterThanOrEqual(59);
      expect(await nic.queues[0].rx.wait(0)).toBe(false);
    },
  );

  it('takes no processor meanwhile, unless it polls', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0]);
    const [{ rx }] = nic.queues;
    const spent = async (policy: WaitPolicy) => {
      rx.policy = policy;
      const before = process.cpuUsage();
      expect(await rx.wait(400)).toBe(false);
      const { user, system } = process.cpuUsage(before);
      return (user + system) / 1000;
    };
    // The least of a few: others in this process have work too.
    const least = async (policy: WaitPolicy) => {
      let least = Infinity;
      for (let i = 0; i < 8 && least >= 100; i++) least = Math.min(least, await spent(policy));
      return least;
    };
    expect(await least('interrupt')).toBeLessThan(100);
    expect(await least('adaptive')).toBeLessThan(100);
  });

  it('is over as soon as the device interrupts', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0]);
    nic.queues[0].rx.policy = 'interrupt';
    // Looking again without an interrupt takes 100 ms each time; with one it may, on a machine that has no time.
    let shortest = Infinity;
    for (let i = 0; i < 10 || (i < 100 && shortest >= 60); i++) {
      const frame = frames[i % frames.length];
      const start = performance.now();
      const arrived = takeWaiting(nic, 1);
      await send(nic, [frame], null);
      expect(await arrived).toEqual([frame]);
      shortest = Math.min(shortest, performance.now() - start);
    }
    expect(shortest).toBeLessThan(60);
  });

  it('serves each of several queues, also those that share a vector', async () => {
    for (const faults of [[], ['msix-one'], ['vector-zero-only']] as FaultName[][]) {
      const device = await startDevice({ queuePairs: 2, faults });
      const nic = await open(device.addresses[0], { queuePairs: 2 });
      const packets = new Uint32Array(64);
      let taken = 0;
      const takers = nic.queues.map(async ({ rx }) => {
        while (taken < 30 && nic.broken === null) {
          await rx.wait(500);
          const got = rx.burst(packets, 64);
          nic.packets.free(packets, got);
          taken += got;
        }
      });
      await sleep(20);
      await send(nic, frames.slice(0, 30), null);
      await Promise.all(takers);
      expect(taken).toBe(30);
      await cleanUp();
    }
  });

  it.each<{ faults: FaultName[]; interrupts: boolean }>([
    { faults: ['no-interrupts'], interrupts: true },
    { faults: ['interrupt-storm'], interrupts: true },
    { faults: [], interrupts: false },
  ])('does not depend on interrupts: faults $faults, wanted $interrupts', async ({ faults, interrupts }) => {
    const device = await startDevice({ faults });
    const nic = await open(device.addresses[0], { interrupts });
    nic.queues[0].rx.policy = 'interrupt';
    const arrived = takeWaiting(nic, 3);
    for (const frame of frames.slice(0, 3)) {
      await sleep(10);
      await send(nic, [frame], null);
    }
    expect(await arrived).toEqual(frames.slice(0, 3));
  });

  it('goes through a reset of the queue', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0]);
    nic.queues[0].rx.policy = 'interrupt';
    const waiting = nic.queues[0].rx.wait(5000);
    await sleep(20);
    await nic.queues[0].reset('rx');
    await send(nic, frames.slice(0, 1), null);
    expect(await waiting).toBe(true);
  });

  it('ends with the reason when the device is lost, and when the NIC is closed', async () => {
    const device = await spawnDevice();
    const nic = await open(device.addresses[0]);
    nic.queues[0].rx.policy = 'interrupt';
    const lost = expect(nic.queues[0].rx.wait()).rejects.toThrow(expect.objectContaining({ code: 'DEVICE_GONE' }));
    await sleep(20);
    await device.kill();
    await lost;
    const other = await startDevice();
    const second = await open(other.addresses[0]);
    const closed = expect(second.queues[0].rx.wait()).rejects.toThrow(expect.objectContaining({ code: 'NIC_CLOSED' }));
    await sleep(20);
    await second.close();
    await closed;
  });

  it('is a loop over bursts, which ends when the NIC is closed', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0]);
    const out: Buffer[] = [];
    const loop = (async () => {
      for await (const packets of nic.queues[0].rx) {
        for (const p of packets) out.push(Buffer.from(nic.packets.read(p)));
        nic.packets.free(packets, packets.length);
      }
    })();
    await send(nic, frames, null);
    await until(
      () => out.length === frames.length,
      () => `${out.length} of ${frames.length}`,
    );
    expect(out).toEqual(frames);
    await nic.close();
    await loop;
  });
});

describe('the link', () => {
  it.each([true, false])('is told of when it goes down; interrupts: %s', async (interrupts) => {
    const { a, wire } = await openPair({ nic: { interrupts } }, { ipsec: false });
    const told: NicLink[] = [];
    const stop = a.onLink((link) => told.push(link));
    expect(a.link.up).toBe(true);
    wire.cut();
    await until(
      () => told.length > 0,
      () => 'no event',
    );
    expect(told).toEqual([expect.objectContaining({ up: false })]);
    expect(a.link.up).toBe(false);
    stop();
  });
});

describe('a device that asks for a reset', () => {
  it('is noticed without anybody asking', async () => {
    // It returns each buffer twice, finds its packed ring in disorder, and fails.
    const device = await startDevice({ faults: ['used-id-twice'] });
    const nic = await open(device.addresses[0], { ipsec: 'off', ring: 'packed' });
    const broken = new Promise((resolve) => nic.onBroken(resolve));
    const packets = new Uint32Array(64);
    const n = nic.packets.allocate(packets, 64);
    for (let i = 0; i < n; i++) nic.packets.write(packets[i], frames[i % frames.length]);
    // Nobody looks at the rings any more, so nobody but the device can say.
    nic.queues[0].tx.burst(packets, n);
    expect(await broken).toEqual(expect.objectContaining({ code: 'DEVICE_NEEDS_RESET' }));
  });
});

import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { FaultName } from '../../src/device/index.ts';
import { Feature, type WaitPolicy } from '../../src/index.ts';
import { UserRegion } from '../../src/vfio/user-region.ts';
import { ProtocolFeature } from '../../src/virtio/vhost-user-protocol.ts';
import { startBackEnd, cleanUp as stopBackEnds } from '../virtio/vhost-user/fake.ts';
import { capture, cleanUp, open, receive, send, spawnDevice, startDevice, until } from './support.ts';
import { Host, hire, turns } from './worker-support.ts';

afterEach(async () => {
  vi.restoreAllMocks();
  await cleanUp();
  await stopBackEnds();
});

const frames = capture('http-ipv4');
const code = (name: string) => expect.objectContaining({ code: name });
const rejects = (name: string) => expect.objectContaining({ message: name });

/** One device with `pairs` queue pairs, all but the first for workers. */
async function nicWithWorkers(pairs = 2, faults: FaultName[] = [], options: Parameters<typeof open>[1] = {}) {
  const device = await startDevice({ queuePairs: pairs, faults });
  const nic = await open(device.addresses[0], { queuePairs: pairs, workerQueues: pairs - 1, ...options });
  return { nic };
}

describe('a queue pair in a worker thread', () => {
  it.each(['split', 'packed'] as const)('sends and receives by itself, and is counted meanwhile: %s', async (ring) => {
    const { nic } = await nicWithWorkers(3, [], { ring });
    expect(nic.queues).toHaveLength(1);
    expect(nic.workerQueues.map(({ index, state }) => [index, state])).toEqual([
      [1, 'free'],
      [2, 'free'],
    ]);
    const hosts = await Promise.all(nic.workerQueues.map((queue) => hire(queue)));
    const [a, b] = [frames.slice(0, 30), frames.slice(4, 44)];
    expect(await Promise.all([hosts[0].send(1, a), hosts[1].send(2, b)])).toEqual([30, 40]);
    const [gotA, gotB] = await Promise.all([hosts[0].receive(1, 30), hosts[1].receive(2, 40)]);
    expect(gotA.map(({ frame }) => frame)).toEqual(a);
    expect(gotB.map(({ frame }) => frame)).toEqual(b);
    const bytes = [...a, ...b].reduce((sum, { length }) => sum + length, 0);
    expect(nic.statistics()).toMatchObject({ tx: { packets: 70, bytes }, rx: { packets: 70, bytes } });
    // The control thread has its own, as before.
    await send(nic, frames.slice(0, 5), null);
    expect((await receive(nic, 5)).map(({ frame }) => frame)).toEqual(frames.slice(0, 5));
    expect(nic.statistics().tx.packets).toBe(75);
  });

  it('may be all that there is', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0], { workerQueues: 1 });
    expect(nic.queues).toEqual([]);
    const host = await hire(nic.workerQueues[0]);
    await host.send(0, frames);
    expect((await host.receive(0, frames.length)).map(({ frame }) => frame)).toEqual(frames);
  });

  it('notifies through the control thread when it cannot by itself', async () => {
    vi.spyOn(UserRegion.prototype, 'share').mockReturnValue(null);
    const { nic } = await nicWithWorkers();
    const handle = await nic.workerQueues[0].transfer();
    expect('relay' in handle.tx.doorbell).toBe(true);
    const host = new Host();
    await host.open(handle);
    for (const some of [frames.slice(0, 3), frames]) {
      await host.send(1, some);
      expect((await host.receive(1, some.length)).map(({ frame }) => frame)).toEqual(some);
    }
  });

  it.each<WaitPolicy>(['poll', 'interrupt', 'adaptive'])('waits for packets: %s', async (policy) => {
    const { nic } = await nicWithWorkers();
    const host = await hire(nic.workerQueues[0]);
    await host.policy(1, policy);
    expect(await host.do('wait', { index: 1, timeout: 50 })).toBe(false);
    for (let i = 0; i < 10; i++) {
      const arrived = host.receive(1, 1, 5000);
      await host.send(1, [frames[i]]);
      expect((await arrived).map(({ frame }) => frame)).toEqual([frames[i]]);
    }
  });

  it.each<{ faults: FaultName[] }>([{ faults: ['no-interrupts'] }, { faults: ['msix-one'] }])(
    'waits without an interrupt of its own: $faults',
    async ({ faults }) => {
      const { nic } = await nicWithWorkers(2, faults);
      const host = await hire(nic.workerQueues[0]);
      await host.policy(1, 'interrupt');
      const arrived = host.receive(1, 3, 5000);
      await host.send(1, frames.slice(0, 3));
      expect(await arrived).toHaveLength(3);
    },
  );

  it('is for one thread: its handle opens once, and not at all when the NIC is closed', async () => {
    const { nic } = await nicWithWorkers(3);
    const [first, second] = nic.workerQueues;
    const handle = await first.transfer();
    await expect(first.transfer()).rejects.toThrow(code('QUEUE_TAKEN'));
    const host = new Host();
    await host.open(handle);
    // What is left of it after the port has gone.
    const { port: _port, ...again } = handle;
    await expect(host.do('open', { handle: again })).rejects.toThrow(rejects('QUEUE_TAKEN'));
    await expect(first.transfer()).rejects.toThrow(code('QUEUE_TAKEN'));
    const late = await second.transfer();
    await nic.close();
    await expect(host.open(late)).rejects.toThrow();
    await expect(second.transfer()).rejects.toThrow(code('NIC_CLOSED'));
  });

  it('is refused with ffi-rs, which works in the main thread only', async () => {
    const { nic } = await nicWithWorkers();
    const host = new Host({ env: { ...process.env, VIPSEC_FFI: 'ffi-rs' } });
    const failed = new Promise((resolve) => host.worker.on('error', resolve));
    const handle = await nic.workerQueues[0].transfer();
    host.open(handle).catch(() => {});
    expect(await failed).toEqual(code('FFI_MAIN_THREAD_ONLY'));
    await until(
      () => nic.workerQueues[0].state === 'free',
      () => 'the queue did not come back',
    );
  });
});

describe('the end of a thread with a queue pair', () => {
  it('gives the queue back for the next one, whichever way it came', async () => {
    const { nic } = await nicWithWorkers();
    const [queue] = nic.workerQueues;
    const ends: string[] = [];
    queue.onEnd((end) => ends.push(end));
    const endings: ((host: Host) => unknown)[] = [
      (host) => host.do('close', { index: 1 }),
      (host) => host.worker.terminate(),
      (host) => host.do('throw').catch(() => {}),
      // Asleep.
      async (host) => {
        await host.policy(1, 'interrupt');
        host.do('wait', { index: 1, timeout: 600_000 }).catch(() => {});
        await sleep(20);
        await host.worker.terminate();
      },
      (host) => {
        host.spin(1, frames[0]);
        return host.worker.terminate();
      },
    ];
    let sent = 0;
    for (const end of endings) {
      const host = await hire(queue);
      await host.send(1, frames.slice(0, 10));
      expect(await host.receive(1, 10)).toHaveLength(10);
      sent += 10;
      await end(host);
      await until(
        () => queue.state === 'free',
        () => 'the queue did not come back',
      );
      expect(nic.statistics().tx.packets).toBeGreaterThanOrEqual(sent);
      expect(nic.broken).toBeNull();
    }
    expect(ends).toEqual(['released', 'died', 'died', 'died', 'died']);
  });

  it('is the end of the queue when the device cannot reset a single one', async () => {
    const { nic } = await nicWithWorkers(2, [], { decline: [Feature.RING_RESET] });
    const [queue] = nic.workerQueues;
    const host = await hire(queue);
    await host.do('close', { index: 1 });
    await until(
      () => queue.state === 'free',
      () => 'the queue did not come back',
    );
    await expect(queue.transfer()).rejects.toThrow(code('NO_RING_RESET'));
    expect(queue.state).toBe('free');
    await send(nic, frames.slice(0, 3), null);
    expect(await receive(nic, 3)).toHaveLength(3);
  });

  it('leaves no descriptors behind', async () => {
    const { nic } = await nicWithWorkers();
    const [queue] = nic.workerQueues;
    const { readdirSync } = await import('node:fs');
    const counts: number[] = [];
    for (let i = 0; i < 4; i++) {
      const host = await hire(queue);
      await (i % 2 === 0 ? host.do('close', { index: 1 }) : null);
      await host.worker.terminate();
      await until(
        () => queue.state === 'free',
        () => 'the queue did not come back',
      );
      counts.push(readdirSync('/proc/self/fd').length);
    }
    // The first thread may have brought something that stays.
    expect(counts.slice(1)).toEqual([counts[1], counts[1], counts[1]]);
  });
});

describe('the end of a NIC with worker threads', () => {
  it('reaches threads that poll, that wait, and does not wait for ever for one that does neither', async () => {
    const { nic } = await nicWithWorkers(4);
    const [polling, waiting, blocked] = await Promise.all(nic.workerQueues.map((queue) => hire(queue)));
    const spinning = polling.spin(1, frames[0]);
    await waiting.policy(2, 'interrupt');
    const waited = expect(waiting.do('wait', { index: 2, timeout: 60_000 })).rejects.toThrow(rejects('NIC_CLOSED'));
    const words = new Int32Array(new SharedArrayBuffer(4));
    const freed = blocked.do('block', { words });
    await turns(spinning);
    await nic.close();
    expect(await spinning.ended).toBe('NIC_CLOSED');
    await waited;
    // It comes back to a queue that is gone, and to memory that is still its own.
    Atomics.store(words, 0, 1);
    Atomics.notify(words, 0);
    await freed;
    expect(await blocked.send(3, frames.slice(0, 3))).toBe(0);
    expect(await blocked.do('broken', { index: 3 })).toBe('NIC_CLOSED');
  });

  it('is told to them with its reason when the device is lost', async () => {
    const device = await spawnDevice({ queuePairs: 3 });
    const nic = await open(device.addresses[0], { queuePairs: 3, workerQueues: 2 });
    const [polling, waiting] = await Promise.all(nic.workerQueues.map((queue) => hire(queue)));
    const spinning = polling.spin(1, frames[0]);
    await waiting.policy(2, 'interrupt');
    const waited = expect(waiting.do('wait', { index: 2, timeout: 60_000 })).rejects.toThrow();
    await turns(spinning);
    await device.kill();
    await until(
      () => nic.broken !== null,
      () => 'nobody noticed',
    );
    expect(await spinning.ended).toBe(nic.broken?.code);
    await waited;
    await expect(nic.workerQueues[0].transfer()).rejects.toThrow(code(nic.broken?.code ?? ''));
  });

  it('comes from a device that breaks its rules on their rings', async () => {
    // With one pair nothing is asked of the control queue, which the device would break too.
    const device = await startDevice({ faults: ['used-id-bogus'] });
    const nic = await open(device.addresses[0], { workerQueues: 1, ipsec: 'off' });
    const host = await hire(nic.workerQueues[0]);
    await host.send(0, frames.slice(0, 8));
    const spinning = host.spin(0, frames[0]);
    await until(
      () => nic.broken !== null,
      () => 'nobody noticed',
    );
    expect(nic.broken).toEqual(code('USED_ID'));
    expect(await spinning.ended).toBe('USED_ID');
  });

  it('comes from a thread that reads that its queue is broken, and tries no burst any more', async () => {
    const device = await startDevice({ faults: ['used-id-bogus'] });
    const nic = await open(device.addresses[0], { workerQueues: 1, ipsec: 'off' });
    const host = await hire(nic.workerQueues[0]);
    expect(await host.do('burst', { index: 0, frame: frames[0] })).toBe(1);
    let found: unknown = null;
    // Found out by the timer that looks after the ring.
    for (const deadline = performance.now() + 20_000; found === null && performance.now() < deadline; await sleep(1)) {
      found = await host.do('broken', { index: 0 });
    }
    expect(found).toBe('USED_ID');
    await until(
      () => nic.broken !== null,
      () => 'the NIC was not told',
    );
    expect(nic.broken).toEqual(code('USED_ID'));
  });
});

describe('a queue pair of a vhost-user port in a worker thread', () => {
  it.each(['split', 'packed'] as const)('kicks and is interrupted without the control thread: %s', async (ring) => {
    const { VERSION_1, MQ, CTRL_VQ, EVENT_IDX, RING_PACKED } = Feature;
    const features = [VERSION_1, MQ, CTRL_VQ, EVENT_IDX, RING_PACKED];
    const { MQ: PAIRS, REPLY_ACK, STATUS, CONFIGURE_MEM_SLOTS, RESET_DEVICE } = ProtocolFeature;
    const backEnd = await startBackEnd({
      process: true,
      device: {
        loop: true,
        features,
        protocol: [PAIRS, REPLY_ACK, STATUS, CONFIGURE_MEM_SLOTS, RESET_DEVICE],
        queuePairs: 2,
      },
    });
    const nic = await open(`vhost-user:${backEnd.path}`, { queuePairs: 2, workerQueues: 1, ring });
    const host = await hire(nic.workerQueues[0]);
    await host.policy(1, 'interrupt');
    for (const some of [frames.slice(0, 1), frames.slice(0, 1), frames]) {
      const arrived = host.receive(1, some.length, 5000);
      await host.send(1, some);
      expect((await arrived).map(({ frame }) => frame)).toEqual(some);
    }
    await nic.close();
    await backEnd.settled();
    expect(backEnd.violations).toEqual([]);
  });
});

import { writeSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { VfioError } from '../../src/errors.ts';
import { CauseInterrupts } from '../../src/nic/causes.ts';
import type { DeviceFunction } from '../../src/vfio/function.ts';
import { IsrBit, NO_VECTOR } from '../../src/virtio/pci-layout.ts';
import { until } from '../device/helpers/raw-client.ts';

/** A device with two vectors that serve all queues. */
class SharedVectors {
  interruptVectors = 2;
  eventfds: readonly number[] = [];
  readonly flags = new Set<number>();
  isr = 0;
  lost = false;
  interrupts: CauseInterrupts | null = null;

  make(wanted = true): CauseInterrupts {
    const fn = {
      interruptVectors: 2,
      gone: false,
      setInterrupts: (eventfds: readonly number[]) => {
        this.eventfds = [...eventfds];
      },
    };
    const causes = {
      take: (queue: number) => {
        this.#alive();
        return this.flags.delete(queue);
      },
    };
    const readIsr = () => {
      this.#alive();
      const { isr } = this;
      this.isr = 0;
      return isr;
    };
    const transport = { readIsr, interruptVectors: this.interruptVectors };
    this.interrupts = new CauseInterrupts(partial(fn), transport, causes, wanted);
    return this.interrupts;
  }

  #alive(): void {
    if (this.lost) throw new VfioError('DEVICE_GONE', 'gone');
  }

  fire(vector: number): void {
    writeSync(this.eventfds[vector], Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0));
  }
}

/** What is used of a function. */
function partial(fn: Pick<DeviceFunction, 'interruptVectors' | 'gone' | 'setInterrupts'>): DeviceFunction {
  const unused = (): never => {
    throw new Error('not of this test');
  };
  return { address: 'fake', behindIommu: false, allocateDma: unused, freeDma: unused, close: unused, ...fn };
}

function asleep(interrupts: CauseInterrupts, pair: number, ms: number): Promise<void> {
  return new Promise((resolve, reject) => {
    interrupts.sleep(pair, ms, (result) => (result instanceof Error ? reject(result) : resolve()));
  });
}

/** Follows a sleep. */
function watch(sleeping: Promise<void>): { over: boolean } {
  const state = { over: false };
  void sleeping.then(() => {
    state.over = true;
  });
  return state;
}

const open: SharedVectors[] = [];
afterEach(() => {
  for (const device of open.splice(0)) device.interrupts?.close();
});

function device(): SharedVectors {
  const made = new SharedVectors();
  open.push(made);
  return made;
}

const LONG = 100;

describe('interrupts that queues share', () => {
  it('wake those whose flag is set, whichever vector fires, and nobody else', async () => {
    const shared = device();
    const interrupts = shared.make();
    const started = performance.now();
    const [first, second] = [watch(asleep(interrupts, 0, LONG)), watch(asleep(interrupts, 1, LONG))];
    shared.flags.add(2);
    shared.fire(0);
    await until('the second', () => second.over);
    if (performance.now() - started < LONG / 2) expect(first.over).toBe(false);
    expect(shared.flags.size).toBe(0);
    shared.flags.add(0);
    shared.fire(1);
    await until('the first', () => first.over);
  });

  it('are not slept through when they came before', async () => {
    const shared = device();
    const interrupts = shared.make();
    shared.flags.add(0);
    const started = performance.now();
    await asleep(interrupts, 0, 60_000);
    expect(performance.now() - started).toBeLessThan(30_000);
  });

  it('are not needed: nobody sleeps longer than told, or than 100 ms', async () => {
    const shared = device();
    const interrupts = shared.make();
    const started = performance.now();
    await asleep(interrupts, 0, 5);
    await asleep(interrupts, 1, 60_000);
    expect(performance.now() - started).toBeGreaterThan(90);
    expect(performance.now() - started).toBeLessThan(30_000);
  });

  it('tell of configuration changes when the ISR byte says so, and of packets not as such', async () => {
    const shared = device();
    const interrupts = shared.make();
    let told = 0;
    const stop = interrupts.onConfigChange(() => told++);
    shared.fire(0);
    await sleep(20);
    expect(told).toBe(0);
    shared.isr = IsrBit.CONFIG;
    shared.fire(0);
    await until('the change', () => told === 1);
    expect(shared.isr).toBe(0);
    if (stop !== false) stop();
  });

  it('end a sleep that is called off, and all of them when they are closed', async () => {
    const shared = device();
    const interrupts = shared.make();
    const [first, second] = [watch(asleep(interrupts, 0, LONG)), watch(asleep(interrupts, 1, LONG))];
    interrupts.wake(0);
    await until('the first', () => first.over);
    interrupts.close();
    await until('the second', () => second.over);
    expect(shared.eventfds).toEqual([]);
  });

  it('wake everybody when the device is lost, and throw into nobody’s event loop', async () => {
    const shared = device();
    const interrupts = shared.make();
    const first = watch(asleep(interrupts, 0, LONG));
    let told = false;
    interrupts.onConfigChange(() => {
      told = true;
    });
    shared.lost = true;
    shared.fire(0);
    await until('the first', () => first.over && told);
  });

  it('are none when they are not wanted, or the device has no vectors', async () => {
    for (const [vectors, wanted] of [
      [2, false],
      [0, true],
    ] as const) {
      const shared = device();
      shared.interruptVectors = vectors;
      const interrupts = shared.make(wanted);
      expect(interrupts.configVector).toBe(NO_VECTOR);
      expect(interrupts.receiveVector(0)).toBe(NO_VECTOR);
      expect(interrupts.handOver(0)).toBeNull();
      expect(interrupts.onConfigChange(() => {})).toBe(false);
      await asleep(interrupts, 0, 1);
      expect(shared.eventfds).toEqual([]);
    }
  });
});

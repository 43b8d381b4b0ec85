import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { VirtioError } from '../../src/errors.ts';
import { TxCounter } from '../../src/virtio-net/tx.ts';
import { TxWatch } from '../../src/virtio-net/tx-watch.ts';
import { content, queues } from './queue-support.ts';

/** Longer than the timer's step and the first patience together. */
const SOON_MS = 60;
const LOOKS = 256;

beforeEach(() => {
  vi.useFakeTimers();
});

afterEach(() => {
  vi.useRealTimers();
});

/** A transmit queue whose device has seen `n` packets and sleeps, without asking for notifications. */
function asleep(n = 3) {
  const q = queues();
  q.tx.burst(q.make(Array.from({ length: n }, (_, i) => content(60, i))), n);
  q.txDevice.suppressNotifications(true);
  q.notified.tx = 0;
  return { q, renotified: () => q.tx.counters[TxCounter.renotified] };
}

describe('a transmit queue whose device has stopped', () => {
  it('notifies it once more, also when nobody does anything with the queue', () => {
    const { q, renotified } = asleep();
    vi.advanceTimersByTime(SOON_MS);
    expect(q.notified.tx).toBe(1);
    expect(renotified()).toBe(1);
    expect(q.sent()).toHaveLength(3);
    vi.advanceTimersByTime(10_000);
    expect(q.notified.tx).toBe(1);
    expect(q.pool.available).toBe(64);
    expect(vi.getTimerCount()).toBe(0);
  });

  it('notifies it when a thread looks again and again, and never comes to its event loop', () => {
    const { q, renotified } = asleep();
    for (let i = 0; i < LOOKS; i++) q.tx.reclaim();
    expect(renotified()).toBe(0);
    // Only the clock goes on: no timer fires.
    vi.setSystemTime(Date.now() + 1);
    const now = performance.now();
    vi.spyOn(performance, 'now').mockImplementation(() => now + 50);
    for (let i = 0; i < LOOKS; i++) q.tx.reclaim();
    expect(renotified()).toBe(1);
    for (let i = 0; i < 4 * LOOKS; i++) q.tx.reclaim();
    expect(renotified()).toBe(1);
    vi.restoreAllMocks();
  });

  it('leaves it more and more time, so that one that cannot send is hardly bothered', () => {
    const { renotified } = asleep();
    vi.advanceTimersByTime(60_000);
    const minute = renotified();
    expect(minute).toBeGreaterThan(50);
    expect(minute).toBeLessThan(75);
    vi.advanceTimersByTime(60_000);
    expect(renotified() - minute).toBeLessThanOrEqual(60);
  });

  it('says nothing while packets come back, however slowly', () => {
    const q = queues();
    q.tx.burst(q.make(Array.from({ length: 16 }, () => content(60))), 16);
    const heads = q.sent(true).map(({ head }) => head);
    for (const head of heads) {
      q.txDevice.complete(head, 0);
      vi.advanceTimersByTime(20);
    }
    vi.advanceTimersByTime(SOON_MS);
    expect(q.tx.counters[TxCounter.renotified]).toBe(0);
    expect(q.pool.available).toBe(64);
  });

  it('begins anew after the device went on', () => {
    const { q, renotified } = asleep();
    vi.advanceTimersByTime(5000);
    const before = renotified();
    expect(before).toBeGreaterThan(5);
    q.sent();
    vi.advanceTimersByTime(SOON_MS);
    expect(renotified()).toBe(before);
    q.tx.burst(q.make([content(60)]), 1);
    vi.advanceTimersByTime(SOON_MS);
    // It waits a short time again, not as long as it had come to.
    expect(renotified()).toBeGreaterThan(before);
  });

  it('notifies no queue that is stopped, broken or closed', () => {
    for (const end of ['stop', 'fail', 'close'] as const) {
      const { q, renotified } = asleep();
      if (end === 'stop') q.txRing.stop();
      else if (end === 'fail') q.txRing.fail(new VirtioError('NIC_CLOSED', 'closed'));
      else q.tx.close();
      vi.advanceTimersByTime(10_000);
      expect(renotified()).toBe(0);
      expect(vi.getTimerCount()).toBe(0);
    }
  });
});

describe('the watch over a transmit ring', () => {
  it('does nothing while the device has nothing', () => {
    const renotify = vi.fn();
    const watch = new TxWatch({ out: 0 }, () => {}, renotify);
    watch.arm();
    for (let i = 0; i < 10 * LOOKS; i++) watch.inVain();
    vi.advanceTimersByTime(10_000);
    expect(renotify).not.toHaveBeenCalled();
    expect(watch.armed).toBe(false);
  });
});

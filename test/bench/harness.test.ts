import { describe, expect, it } from 'vitest';
import { rate, ratio, sampled, summarize } from '../../bench/harness.ts';

/** A workload that takes about `ms` milliseconds a call. */
function busy(ms: number, closed: { count: number }) {
  return () => ({
    operations: 1,
    run: () => {
      const end = performance.now() + ms;
      while (performance.now() < end);
    },
    close: () => void closed.count++,
  });
}

describe('a benchmark', () => {
  it('of a rate gives operations per second, and frees its workload', async () => {
    const closed = { count: 0 };
    const result = await rate('x.y', 'op/s', busy(2, closed), { warmup: 20, time: 60 }).measure();
    expect(result.unit).toBe('op/s');
    // A busy machine makes it slower, never faster.
    expect(result.max).toBeLessThanOrEqual(501);
    expect(result.median).toBeGreaterThan(20);
    expect(result.min).toBeLessThanOrEqual(result.median);
    expect(result.median).toBeLessThanOrEqual(result.max);
    expect(closed.count).toBe(1);
  });

  it('of a ratio compares two workloads', async () => {
    const closed = { count: 0 };
    const result = await ratio('x.y', busy(1, closed), busy(3, closed), 3).measure();
    expect(result.median).toBeGreaterThan(1);
    expect(closed.count).toBe(2);
  });

  it('that throws frees its workload and fails', async () => {
    const closed = { count: 0 };
    const prepare = () => ({
      operations: 1,
      run: () => {
        throw new Error('no');
      },
      close: () => void closed.count++,
    });
    await expect(Promise.resolve().then(() => rate('x.y', 'op/s', prepare).measure())).rejects.toThrow('no');
    expect(closed.count).toBe(1);
  });

  it('that samples gives median, smallest and largest', async () => {
    const values = [5, 1, 4, 2];
    let i = 0;
    expect(await sampled('x.y', 'B', 4, () => values[i++]).measure()).toEqual({ median: 3, min: 1, max: 5, unit: 'B' });
    expect(summarize([7], 'B').median).toBe(7);
    expect(() => summarize([], 'B')).toThrow();
  });
});

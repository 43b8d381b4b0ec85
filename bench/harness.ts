/**
 * What every benchmark suite shares: the shape of a suite, and the measuring.
 *
 * A suite is a file in `bench/suites` that exports `suite: BenchSuite`; its benchmarks' names begin with the file's name
 * and a dot. A suite yields benchmarks; each is measured on its own only when its name was asked for, so setting up is cheap or lazy:
 *
 * ```ts
 * export const suite: BenchSuite = {
 *   name: 'crypto',
 *   *benchmarks() {
 *     yield rate('crypto.noble.aes-128-gcm.64B.mpps', 'Mpps', () => {
 *       const state = prepare()
 *       return { operations: 32 * 1e-6, run: () => encryptBurst(state), close: () => state.free() }
 *     })
 *   },
 * }
 * ```
 *
 * `run` is one round: it does `operations` units of work (packets in millions for Mpps, gigabits for Gbit/s). It should
 * take at least some microseconds: do a whole burst, or many bursts, so that the clock is not what is measured.
 */
import { Bench } from 'tinybench';

/** What is printed: `median`, `min` and `max` of the samples, in `unit`. */
export interface Measurement {
  readonly median: number;
  readonly min: number;
  readonly max: number;
  readonly unit: string;
}

export interface Benchmark {
  /** Stable name, such as `ring.split.tx_rx.mpps`. */
  readonly name: string;
  /** What the median is meant to reach at least, or for a time to stay below. Nothing fails when it does not. */
  readonly goal?: number;
  measure(): Measurement | Promise<Measurement>;
}

export interface BenchSuite {
  readonly name: string;
  /** May yield nothing for what this machine cannot do (a missing library): a benchmark that is listed is measured. */
  benchmarks(): Iterable<Benchmark>;
}

/** Whether less is better. */
export function isTime({ unit }: Measurement): boolean {
  return unit === 'us' || unit === 's';
}

/** One prepared workload. */
export interface Workload {
  /** Units done by one call of `run`: the rate is this divided by the seconds that the call took. */
  readonly operations: number;
  run(): void;
  /** Frees what was prepared; also called when `run` throws. */
  close?(): void;
}

export interface MeasureOptions {
  /** Milliseconds of warming up, and of measuring. */
  readonly warmup?: number;
  readonly time?: number;
}

/** Samples are averages over at least this long: shorter rounds are repeated, so that the clock does not show. */
const MIN_SAMPLE_MS = 1;

/** A benchmark whose figure is `operations` per second of what `prepare` returns. */
export function rate(name: string, unit: string, prepare: () => Workload, options: MeasureOptions = {}): Benchmark {
  return { name, measure: () => measureRate(name, unit, prepare, options) };
}

/** A benchmark that measures by itself; `sample` gives one value each time it is called. */
export function sampled(name: string, unit: string, samples: number, sample: () => number): Benchmark {
  return { name, measure: () => summarize(Array.from({ length: samples }, sample), unit) };
}

/** A benchmark of two workloads in turns, `numerator` over `denominator`: drift of the machine hits both alike. */
export function ratio(
  name: string,
  prepareNumerator: () => Workload,
  prepareDenominator: () => Workload,
  rounds = 15,
): Benchmark {
  return {
    name,
    measure: () => {
      const a = prepareNumerator();
      try {
        const b = prepareDenominator();
        try {
          timed(a, 200);
          timed(b, 200);
          const values: number[] = [];
          for (let i = 0; i < rounds; i++) values.push(timed(a, 30) / timed(b, 30));
          return summarize(values, 'ratio');
        } finally {
          b.close?.();
        }
      } finally {
        a.close?.();
      }
    },
  };
}

/** Units per second over about `ms` milliseconds. */
function timed(workload: Workload, ms: number): number {
  const start = performance.now();
  let calls = 0;
  let now = start;
  while (now - start < ms) {
    workload.run();
    calls++;
    now = performance.now();
  }
  return (workload.operations * calls * 1000) / (now - start);
}

async function measureRate(
  name: string,
  unit: string,
  prepare: () => Workload,
  options: MeasureOptions,
): Promise<Measurement> {
  const workload = prepare();
  try {
    const start = performance.now();
    timed(workload, 20);
    let repeats = 1;
    const once = workload.operations / timed(workload, 20); // seconds a call
    if (once * 1000 < MIN_SAMPLE_MS) repeats = Math.ceil(MIN_SAMPLE_MS / (once * 1000));
    const spent = performance.now() - start;
    const bench = new Bench({
      name,
      warmupTime: Math.max((options.warmup ?? 300) - spent, 10),
      time: options.time ?? 1000,
      retainSamples: true,
    });
    bench.add(name, () => {
      for (let i = 0; i < repeats; i++) workload.run();
    });
    await bench.run();
    const result = bench.tasks[0].result;
    if (result.state === 'errored') throw result.error;
    const samples = 'latency' in result ? result.latency.samples : undefined;
    if (samples === undefined) throw new Error(`${name}: no samples (${result.state})`);
    return summarize(
      samples.map((ms) => (workload.operations * repeats * 1000) / ms),
      unit,
    );
  } finally {
    workload.close?.();
  }
}

export function summarize(values: readonly number[], unit: string): Measurement {
  if (values.length === 0) throw new Error('nothing was measured');
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  return { median, min: sorted[0], max: sorted[sorted.length - 1], unit };
}

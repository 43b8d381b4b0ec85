/**
 * `npm run bench [-- --json] [--only PREFIX] [--list]`: measures every benchmark of every suite in `suites/`.
 *
 * Each benchmark runs in a process of its own: a call site that has seen the shapes of another benchmark costs twice as
 * much, and what a native library does to one must not touch the next. One benchmark runs at a time.
 */
import { fork } from 'node:child_process';
import { readdir } from 'node:fs/promises';
import { arch, cpus, release, totalmem, type } from 'node:os';
import { fileURLToPath } from 'node:url';
import Table from 'cli-table3';
import { Command, Option } from 'commander';
import { type Benchmark, type BenchSuite, isTime, type Measurement } from './harness.ts';

/** A benchmark that takes longer than this is stopped and reported as failed. */
const DEADLINE_MS = 120_000;

interface Options {
  readonly only: string;
  readonly json: boolean;
  readonly list: boolean;
  readonly one?: string;
}

/** The benchmarks whose names begin with `only`. The name of each begins with that of its file, so others need not load. */
async function benchmarks(only: string): Promise<Benchmark[]> {
  const folder = new URL('./suites/', import.meta.url);
  const files = (await readdir(folder)).filter((file) => /(?<!\.d)\.[jt]s$/.test(file)).sort();
  const all: Benchmark[] = [];
  for (const file of files) {
    const prefix = `${file.slice(0, -3)}.`;
    if (!prefix.startsWith(only) && !only.startsWith(prefix)) continue;
    const module: { suite?: BenchSuite } = await import(new URL(file, folder).href);
    if (module.suite === undefined) throw new Error(`bench/suites/${file} exports no suite`);
    for (const one of module.suite.benchmarks()) {
      if (!one.name.startsWith(prefix))
        throw new Error(`bench/suites/${file}: ${one.name} does not begin with ${prefix}`);
      all.push(one);
    }
  }
  return all.filter((one) => one.name.startsWith(only));
}

/** Runs this file again for one benchmark and returns what it sent, or an error text. */
function runAlone(name: string): Promise<Measurement | { readonly error: string }> {
  return new Promise((resolve) => {
    const child = fork(fileURLToPath(import.meta.url), ['--one', name], {
      execArgv: [...process.execArgv, '--expose-gc'],
      stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
    });
    let answer: Measurement | { error: string } = { error: 'the process ended without a result' };
    const timer = setTimeout(() => {
      answer = { error: `no result within ${DEADLINE_MS / 1000} s` };
      child.kill('SIGKILL');
    }, DEADLINE_MS);
    child.on('message', (message: Measurement | { error: string }) => {
      answer = message;
    });
    child.on('error', (error) => {
      answer = { error: error.message };
    });
    child.on('close', () => {
      clearTimeout(timer);
      resolve(answer);
    });
  });
}

async function measureOne(name: string): Promise<void> {
  const one = (await benchmarks(name)).find((candidate) => candidate.name === name);
  let answer: Measurement | { error: string };
  try {
    answer = one === undefined ? { error: 'no such benchmark' } : await one.measure();
  } catch (error) {
    answer = { error: error instanceof Error ? (error.stack ?? error.message) : String(error) };
  }
  process.send?.(answer, () => process.exit(0));
}

function machine(): Record<string, string | number> {
  const processors = cpus();
  return {
    cpu: processors[0]?.model.trim() ?? 'unknown',
    cores: processors.length,
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    os: `${type()} ${release()}`,
    arch: arch(),
    node: process.versions.node,
    v8: process.versions.v8,
  };
}

/** A result as it is printed: with the goal, if the benchmark has one. */
interface Metric extends Measurement {
  readonly goal?: number;
}

/** `>= 0.5`, and whether it was missed. */
function verdict(metric: Metric): string {
  const { goal, median } = metric;
  if (goal === undefined) return '';
  const missed = isTime(metric) ? median >= goal : median < goal;
  return `${isTime(metric) ? '<' : '>='} ${goal}${missed ? ' missed' : ''}`;
}

function printTable(metrics: Record<string, Metric>): void {
  const table = new Table({
    head: ['metric', 'median', 'min', 'max', 'unit', 'goal'],
    colAligns: ['left', 'right', 'right', 'right', 'left', 'left'],
    style: { head: [], border: [], compact: true },
  });
  const show = (value: number) => (Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(4));
  for (const [name, m] of Object.entries(metrics)) {
    table.push([name, show(m.median), show(m.min), show(m.max), m.unit, verdict(m)]);
  }
  process.stdout.write(`${table.toString()}\n`);
}

async function main(): Promise<number> {
  const values = new Command('bench')
    .description('measures every benchmark, each in a process of its own')
    .option('--only <prefix>', 'those whose names begin so', '')
    .option('--json', 'print the results as one JSON document', false)
    .option('--list', 'name the benchmarks and stop', false)
    .addOption(new Option('--one <name>', 'measure this one here and tell the parent').hideHelp())
    .parse()
    .opts<Options>();
  if (values.one !== undefined) {
    await measureOne(values.one);
    return 0;
  }
  const chosen = await benchmarks(values.only);
  if (chosen.length === 0) {
    process.stderr.write(`bench: error: no benchmark begins with '${values.only}'\n`);
    return 2;
  }
  if (values.list) {
    for (const one of chosen) process.stdout.write(`${one.name}\n`);
    return 0;
  }
  const progress = process.stderr.isTTY;
  const metrics: Record<string, Metric> = {};
  let failed = 0;
  for (const [i, { name, goal }] of chosen.entries()) {
    if (progress) process.stderr.write(`\r\x1b[K${i + 1}/${chosen.length} ${name}`);
    const answer = await runAlone(name);
    if ('error' in answer) {
      failed++;
      process.stderr.write(`${progress ? '\r\x1b[K' : ''}bench: error: ${name}: ${answer.error}\n`);
    } else {
      metrics[name] = goal === undefined ? answer : { ...answer, goal };
    }
  }
  if (progress) process.stderr.write('\r\x1b[K');
  if (values.json) process.stdout.write(`${JSON.stringify({ machine: machine(), metrics }, null, 2)}\n`);
  else printTable(metrics);
  return failed === 0 ? 0 : 1;
}

process.exitCode = await main();

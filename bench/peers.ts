/**
 * `npm run bench:peers [-- --json] [--only PART] [--seconds N] [--rounds N] [--queue-size N] [--cores C,V,D,H]`: our driver over vhost-user
 * and DPDK's virtio_user against the same vhost device of testpmd, turn about: frames of 64 bytes sent, received and forwarded, over split
 * and packed rings.
 *
 * By hand, on a machine with little else to do and four cores: C for commands, V for the vhost device, D and H for a driver, of which
 * DPDK uses one and Node the other for its compiler and garbage collector. Rates are those that the vhost device counts, so both are
 * measured alike. In `forward` 256 frames circle: the vhost device sends back what it gets, the driver swaps the addresses.
 *
 * A run is cut into short windows, of which those do not count in which the thread of either side had to wait for its core; a row is
 * marked when hardly any are left.
 */
import { spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import Table from 'cli-table3';
import { Command } from 'commander';
import { Testpmd } from './testpmd.ts';

const WARM_UP_MS = 1500;
/** What issue is taken with: a driver in JavaScript may be so much slower than one in C. */
const GOAL = 0.7;
const READY = /ready\n/;

const MODES = ['tx', 'rx', 'forward'] as const;
const RINGS = ['split', 'packed'] as const;
type Mode = (typeof MODES)[number];
type Ring = (typeof RINGS)[number];
type Who = 'ours' | 'dpdk';

/** Which core does what. */
interface Cores {
  readonly commands: number;
  readonly vhost: number;
  readonly driver: number;
  readonly helper: number;
}

interface Options {
  readonly only: string;
  readonly seconds: string;
  readonly rounds: string;
  readonly queueSize: string;
  readonly cores: string;
  readonly json: boolean;
}

interface Settings {
  readonly cores: Cores;
  readonly seconds: number;
  readonly rounds: number;
  readonly queueSize: number;
}

/** What the vhost device does, and which of its counters is the rate. */
const DEVICE = {
  tx: { forward: 'rxonly', start: 'start', counter: 'received' },
  rx: { forward: 'txonly', start: 'start', counter: 'sent' },
  forward: { forward: 'io', start: 'start tx_first 8', counter: 'received' },
} as const;
const DRIVER = { tx: 'txonly', rx: 'rxonly', forward: 'macswap' } as const;

/** Length of a window, the share of a core that both sides must have had for it to count, and how often a run may be prolonged. */
const WINDOW_MS = 100;
const UNDISTURBED = 0.98;
const PATIENCE = 5;
/** Fewer windows than this say little. */
const MIN_WINDOWS = 3;

/** A driver that runs until it is stopped. */
interface Driver {
  readonly pid: number;
  stop(): Promise<void>;
}

async function startOurs(path: string, mode: Mode, ring: Ring, { cores: all, queueSize }: Settings): Promise<Driver> {
  const script = fileURLToPath(new URL('./peers-driver.js', import.meta.url));
  const cores = `${all.driver},${all.helper}`;
  const args = ['-c', cores, process.execPath, script, `vhost-user:${path}`, mode, ring, String(queueSize)];
  const child = spawn('taskset', args, { stdio: ['pipe', 'pipe', 'inherit'] });
  const ended = new Promise<number | null>((resolve) => child.once('close', resolve));
  let output = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    output += text;
  });
  while (!READY.test(output)) {
    if (child.exitCode !== null) throw new Error('our driver ended before it was ready');
    await sleep(5);
  }
  return {
    pid: child.pid ?? -1,
    stop: async () => {
      child.stdin.end();
      const timer = setTimeout(() => child.kill('SIGKILL'), 10_000);
      const code = await ended;
      clearTimeout(timer);
      if (code !== 0) throw new Error(`our driver ended with ${code}`);
    },
  };
}

async function startDpdk(path: string, mode: Mode, ring: Ring, settings: Settings, folder: string): Promise<Driver> {
  const packed = ring === 'packed' ? 1 : 0;
  const { cores } = settings;
  const options = `queues=1,queue_size=${settings.queueSize},packed_vq=${packed},in_order=1,mrg_rxbuf=0`;
  const driver = await Testpmd.start({
    folder,
    cores: `0@${cores.commands},1@${cores.driver}`,
    devices: [`net_virtio_user0,path=${path},${options}`],
    args: [`--forward-mode=${DRIVER[mode]}`, '--auto-start', '--no-flush-rx'],
  });
  return { pid: driver.pid, stop: () => driver.quit() };
}

/** Milliseconds that each thread of a process has run (proc(5), `/proc/[pid]/task/[tid]/schedstat`). */
function runTimes(pid: number): Map<string, number> {
  const times = new Map<string, number>();
  for (const thread of readdirSync(`/proc/${pid}/task`)) {
    times.set(thread, Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, 'utf8').split(' ')[0]) / 1e6);
  }
  return times;
}

/** Milliseconds that the busiest thread has run from `before` to `after`. */
function busiest(before: ReadonlyMap<string, number>, after: ReadonlyMap<string, number>): number {
  return Math.max(...[...after].map(([thread, time]) => time - (before.get(thread) ?? 0)));
}

interface Run {
  /** Mpps in each window that counts. */
  readonly rates: readonly number[];
  /** Windows that did not count. */
  readonly disturbed: number;
}

async function measure(who: Who, mode: Mode, ring: Ring, settings: Settings): Promise<Run> {
  const folder = mkdtempSync(join(tmpdir(), 'vipsec-peers-'));
  const path = join(folder, 'port.sock');
  const { forward, start } = DEVICE[mode];
  const device = await Testpmd.start({
    folder,
    cores: `0@${settings.cores.commands},1@${settings.cores.vhost}`,
    devices: [`net_vhost0,iface=${path}`],
    args: [`--forward-mode=${forward}`, '--no-flush-rx'],
  });
  try {
    const driver = await (who === 'ours'
      ? startOurs(path, mode, ring, settings)
      : startDpdk(path, mode, ring, settings, folder));
    try {
      await device.command(start, /forwards packets on/);
      await sleep(WARM_UP_MS);
      return await watch(device, driver.pid, mode, settings);
    } finally {
      await driver.stop();
    }
  } finally {
    await device.quit();
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Looks at the device's counter in windows, until enough of them count or patience ends. */
async function watch(device: Testpmd, driver: number, mode: Mode, { seconds }: Settings): Promise<Run> {
  const { counter } = DEVICE[mode];
  const pids = [device.pid, driver];
  const wanted = Math.ceil((seconds * 1000) / WINDOW_MS);
  const look = async () => {
    const statistics = await device.statistics();
    return { at: performance.now(), packets: statistics[counter], times: pids.map(runTimes) };
  };
  const rates: number[] = [];
  let disturbed = 0;
  let before = await look();
  while (rates.length < wanted && rates.length + disturbed < PATIENCE * wanted) {
    await sleep(WINDOW_MS);
    const after = await look();
    const elapsed = after.at - before.at;
    const share = Math.min(...after.times.map((times, i) => busiest(before.times[i], times))) / elapsed;
    if (share >= UNDISTURBED) rates.push((after.packets - before.packets) / elapsed / 1000);
    else disturbed++;
    before = after;
  }
  return { rates, disturbed };
}

interface Row {
  readonly ours: number;
  readonly dpdk: number;
  readonly ratio: number;
  /** Hardly any window of some run counted: the numbers say little. */
  readonly disturbed: boolean;
}

async function compare(mode: Mode, ring: Ring, settings: Settings): Promise<Row> {
  const rates: Record<Who, number[]> = { ours: [], dpdk: [] };
  let disturbed = false;
  for (let round = 0; round < settings.rounds; round++) {
    // Turn about, and first the one, then the other.
    const order: readonly Who[] = round % 2 === 0 ? ['ours', 'dpdk'] : ['dpdk', 'ours'];
    for (const who of order) {
      const run = await measure(who, mode, ring, settings);
      const rate = run.rates.length === 0 ? 0 : median(run.rates);
      process.stderr.write(`${ring} ${mode} ${who}: ${rate.toFixed(2)} Mpps (${run.rates.length} windows, `);
      process.stderr.write(`${run.disturbed} disturbed)\n`);
      rates[who].push(rate);
      disturbed ||= run.rates.length < MIN_WINDOWS;
    }
  }
  const [ours, dpdk] = [median(rates.ours), median(rates.dpdk)];
  return { ours, dpdk, ratio: ours / dpdk, disturbed };
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function number(name: string, text: string, min: number): number {
  const value = Number(text);
  if (!(value >= min)) throw new Error(`--${name} must be at least ${min}`);
  return value;
}

/** `C,V,D,H`. */
function coresOf(text: string): Cores {
  const numbers = text.split(',').map(Number);
  const known = numbers.every((core) => Number.isInteger(core) && core >= 0 && core < cpus().length);
  if (numbers.length !== 4 || !known || new Set(numbers).size !== 4) throw new Error('--cores must name four cores');
  const [commands, vhost, driver, helper] = numbers;
  return { commands, vhost, driver, helper };
}

async function main(): Promise<void> {
  const values = new Command('bench:peers')
    .description("compares our driver with DPDK's virtio_user at DPDK's vhost device, turn about")
    .option('--only <text>', 'rows with this in their name', '')
    .option('--seconds <s>', 'of each window', '2')
    .option('--rounds <n>', 'windows for each side', '3')
    .option('--queue-size <n>', 'descriptors of each ring', '256')
    .option('--cores <c,v,d,h>', 'cores for commands, the vhost device and the driver (two)', '0,1,2,3')
    .option('--json', 'print the results as one JSON document', false)
    .parse()
    .opts<Options>();
  if (cpus().length < 4) throw new Error('bench:peers needs four cores');
  const settings = {
    cores: coresOf(values.cores),
    seconds: number('seconds', values.seconds, 0.1),
    rounds: number('rounds', values.rounds, 1),
    queueSize: number('queue-size', values.queueSize, 64),
  };
  const metrics: Record<string, Row> = {};
  for (const ring of RINGS) {
    for (const mode of MODES) {
      const name = `peers.${ring}.${mode}.64B`;
      if (name.includes(values.only)) metrics[name] = await compare(mode, ring, settings);
    }
  }
  if (values.json) {
    process.stdout.write(`${JSON.stringify({ settings, goal: GOAL, metrics })}\n`);
    return;
  }
  const table = new Table({
    head: ['metric', 'ours, Mpps', 'virtio_user, Mpps', 'ratio'],
    colAligns: ['left', 'right', 'right', 'right'],
    style: { head: [], border: [], compact: true },
  });
  for (const [name, { ours, dpdk, ratio, disturbed }] of Object.entries(metrics)) {
    const verdict = disturbed ? ' (disturbed)' : ratio < GOAL ? ' (too low)' : '';
    table.push([name, ours.toFixed(2), dpdk.toFixed(2), `${ratio.toFixed(2)}${verdict}`]);
  }
  process.stdout.write(`${table.toString()}\n`);
}

await main();

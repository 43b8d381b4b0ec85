/**
 * `npm run bench:peers [-- --json] [--only PART] [--seconds N] [--rounds N] [--queue-size N]`: our driver over vhost-user and DPDK's virtio_user
 * against the same vhost device of testpmd, turn about: frames of 64 bytes sent, received and forwarded, over split and packed rings.
 *
 * By hand, on a machine with nothing else to do and four cores: one for commands, one for the vhost device, and two for a driver, of which
 * DPDK uses one and Node the other for its compiler and garbage collector. Rates are those that the vhost device counts, so both are
 * measured alike. In `forward` 256 frames circle: the vhost device sends back what it gets, the driver swaps the addresses. A run during
 * which either side did not have its core to itself is made again a few times, and marked when that does not help.
 */
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import Table from 'cli-table3';
import { Testpmd } from './testpmd.ts';

const CORES = { commands: 0, vhost: 1, driver: 2, helper: 3 } as const;
const WARM_UP_MS = 1500;
/** What issue is taken with: a driver in JavaScript may be so much slower than one in C. */
const GOAL = 0.7;
const READY = /ready\n/;

const MODES = ['tx', 'rx', 'forward'] as const;
const RINGS = ['split', 'packed'] as const;
type Mode = (typeof MODES)[number];
type Ring = (typeof RINGS)[number];
type Who = 'ours' | 'dpdk';

interface Settings {
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

/** Share of a core that a busy side must have had for a run to count, and how often a run is tried. */
const UNDISTURBED = 0.97;
const ATTEMPTS = 4;
/** Clock ticks a second in /proc (sysconf(_SC_CLK_TCK) on every Linux). */
const TICKS = 100;

/** A driver that runs until it is stopped. */
interface Driver {
  readonly pid: number;
  stop(): Promise<void>;
}

async function startOurs(path: string, mode: Mode, ring: Ring, { queueSize }: Settings): Promise<Driver> {
  const script = fileURLToPath(new URL('./peers-driver.js', import.meta.url));
  const cores = `${CORES.driver},${CORES.helper}`;
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
  const options = `queues=1,queue_size=${settings.queueSize},packed_vq=${packed},in_order=1,mrg_rxbuf=0`;
  const driver = await Testpmd.start({
    folder,
    cores: `0@${CORES.commands},1@${CORES.driver}`,
    devices: [`net_virtio_user0,path=${path},${options}`],
    args: [`--forward-mode=${DRIVER[mode]}`, '--auto-start', '--no-flush-rx'],
  });
  return { pid: driver.pid, stop: () => driver.quit() };
}

/** Seconds of processor time that a process has used (proc(5): utime and stime, behind a name in parentheses). */
function processorTime(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8')
    .replace(/^.*\) /s, '')
    .split(' ');
  return (Number(fields[11]) + Number(fields[12])) / TICKS;
}

interface Run {
  /** Mpps. */
  readonly rate: number;
  /** Smaller one of the shares of a core that the two sides had. */
  readonly share: number;
}

async function measure(who: Who, mode: Mode, ring: Ring, settings: Settings): Promise<Run> {
  const folder = mkdtempSync(join(tmpdir(), 'vipsec-peers-'));
  const path = join(folder, 'port.sock');
  const { forward, start, counter } = DEVICE[mode];
  const device = await Testpmd.start({
    folder,
    cores: `0@${CORES.commands},1@${CORES.vhost}`,
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
      const pids = [device.pid, driver.pid];
      const busy = pids.map(processorTime);
      const from = performance.now();
      const before = await device.statistics();
      await sleep(settings.seconds * 1000);
      const after = await device.statistics();
      const seconds = (performance.now() - from) / 1000;
      const shares = pids.map((pid, i) => (processorTime(pid) - busy[i]) / seconds);
      return { rate: (after[counter] - before[counter]) / seconds / 1e6, share: Math.min(...shares) };
    } finally {
      await driver.stop();
    }
  } finally {
    await device.quit();
    rmSync(folder, { recursive: true, force: true });
  }
}

/** The best of a few runs if all are disturbed; else the first that is not. */
async function measureUndisturbed(who: Who, mode: Mode, ring: Ring, settings: Settings): Promise<Run> {
  let best: Run | null = null;
  for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
    const run = await measure(who, mode, ring, settings);
    const percent = Math.round(run.share * 100);
    process.stderr.write(`${ring} ${mode} ${who}: ${run.rate.toFixed(2)} Mpps with ${percent} % of a core\n`);
    if (run.share >= UNDISTURBED) return run;
    if (best === null || run.rate > best.rate) best = run;
  }
  return best ?? { rate: 0, share: 0 };
}

interface Row {
  readonly ours: number;
  readonly dpdk: number;
  readonly ratio: number;
  /** Some run did not have its cores to itself: the numbers say little. */
  readonly disturbed: boolean;
}

async function compare(mode: Mode, ring: Ring, settings: Settings): Promise<Row> {
  const rates: Record<Who, number[]> = { ours: [], dpdk: [] };
  let disturbed = false;
  for (let round = 0; round < settings.rounds; round++) {
    // Turn about, and first the one, then the other.
    const order: readonly Who[] = round % 2 === 0 ? ['ours', 'dpdk'] : ['dpdk', 'ours'];
    for (const who of order) {
      const { rate, share } = await measureUndisturbed(who, mode, ring, settings);
      rates[who].push(rate);
      disturbed ||= share < UNDISTURBED;
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

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      json: { type: 'boolean', default: false },
      seconds: { type: 'string', default: '2' },
      rounds: { type: 'string', default: '3' },
      'queue-size': { type: 'string', default: '256' },
      only: { type: 'string', default: '' },
    },
  });
  const settings = {
    seconds: number('seconds', values.seconds, 0.1),
    rounds: number('rounds', values.rounds, 1),
    queueSize: number('queue-size', values['queue-size'], 64),
  };
  if (cpus().length < 4) throw new Error('bench:peers needs four cores');
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

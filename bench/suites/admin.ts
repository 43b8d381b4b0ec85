/**
 * SAs over the administration queue: a driver in this process, the software device in another, everything that `addSa` does included
 * (validation, nonce guard, object, and for inbound SAs a flow filter rule). Calls are made together, as an IKE daemon does after a restart; the
 * driver keeps up to 32 commands in flight.
 *
 * `sa_create` counts outbound SAs, `sa_install_10000` is 5000 of each direction, `sa_install_131072` as many as the device takes:
 * 65536 of each. `sa_memory` is what one SA costs the driver: heap and buffers, without what is set aside when the NIC is opened.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type Direction, type Nic, openNic, type SecurityAssociationInput } from '../../src/index.ts';
import { type BenchSuite, type Measurement, summarize } from '../harness.ts';

const SAMPLES = 3;
const CREATED = 4000;
const INSTALLED = 10_000;
const MOST = 65_536;
const WEIGHED = 16_384;
/** Calls of `addSa` that are under way at once. */
const TOGETHER = 64;

const vipsec = fileURLToPath(new URL('../../tools/vipsec.js', import.meta.url));

/** No key may come back while the process lives, so each SA of a run has its own. */
let keys = 0;

function association(direction: Direction, spi: number): SecurityAssociationInput {
  const key = Buffer.alloc(16);
  key.writeUInt32BE(++keys);
  return {
    direction,
    mode: 'tunnel',
    spi,
    aead: { name: 'aes-gcm', key: key.toString('hex'), salt: '01020304' },
    tunnel: { source: '192.0.2.1', destination: '192.0.2.2' },
  };
}

/** Makes `count` SAs of each of `directions`. */
async function install(nic: Nic, count: number, directions: readonly Direction[]): Promise<void> {
  let next = 0;
  const worker = async () => {
    while (next < count) {
      const spi = 0x1_0000 + next++;
      for (const direction of directions) await nic.ipsec.addSa(association(direction, spi), { require: 'inline' });
    }
  };
  await Promise.all(Array.from({ length: TOGETHER }, worker));
}

/** Runs `measure` with a NIC that has no SAs, `samples` times. */
async function withNics(samples: number, unit: string, measure: (nic: Nic) => Promise<number>): Promise<Measurement> {
  const folder = mkdtempSync(join(tmpdir(), 'vipsec-bench-'));
  const socket = join(folder, 'nic.sock');
  const child: ChildProcess = spawn(process.execPath, [vipsec, 'device', '--json', '--socket', socket], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  try {
    if (child.stdout === null) throw new Error('the device has no output');
    await Promise.race([once(child.stdout, 'data'), once(child, 'exit')]);
    const values: number[] = [];
    for (let i = 0; i < samples; i++) {
      const nic = await openNic(`vfio-user:${socket}`, { ipsec: 'inline', maxSas: MOST });
      try {
        values.push(await measure(nic));
      } finally {
        await nic.close();
      }
    }
    return summarize(values, unit);
  } finally {
    child.kill('SIGKILL');
    rmSync(folder, { recursive: true });
  }
}

async function seconds(work: () => Promise<void>): Promise<number> {
  const start = performance.now();
  await work();
  return (performance.now() - start) / 1000;
}

/** Bytes that are in use once everything unreachable is gone. */
function inUse(): number {
  if (globalThis.gc === undefined) throw new Error('needs --expose-gc');
  for (let i = 0; i < 3; i++) globalThis.gc();
  const { heapUsed, arrayBuffers } = process.memoryUsage();
  return heapUsed + arrayBuffers;
}

async function weigh(nic: Nic, direction: Direction): Promise<number> {
  // What is made once, and what the compiler makes, does not belong to an SA.
  await install(nic, 512, ['outbound']);
  const before = inUse();
  await install(nic, WEIGHED, [direction]);
  return (inUse() - before) / WEIGHED;
}

const BOTH: readonly Direction[] = ['outbound', 'inbound'];

export const suite: BenchSuite = {
  name: 'admin',
  *benchmarks() {
    yield {
      name: 'admin.sa_create.per_s',
      measure: () =>
        withNics(SAMPLES, '1/s', async (nic) => CREATED / (await seconds(() => install(nic, CREATED, ['outbound'])))),
    };
    yield {
      name: 'admin.sa_install_10000.seconds',
      measure: () => withNics(SAMPLES, 's', (nic) => seconds(() => install(nic, INSTALLED / 2, BOTH))),
    };
    yield {
      name: 'admin.sa_install_131072.seconds',
      measure: () => withNics(1, 's', (nic) => seconds(() => install(nic, MOST, BOTH))),
    };
    for (const direction of BOTH) {
      yield {
        name: `admin.sa_memory.${direction}.bytes`,
        measure: () => withNics(1, 'B', (nic) => weigh(nic, direction)),
      };
    }
  },
};

/** Worker threads with queue pairs of their own, for tests. Ended by `cleanUp` of `support.ts`. */
import { Worker, type WorkerOptions } from 'node:worker_threads';
import type { QueueHandle, WaitPolicy, WorkerQueue } from '../../src/index.ts';
import { atEnd, type Received, until } from './support.ts';

const script = new URL('./worker-host.mjs', import.meta.url);
/** The longest that any answer may take. */
const PATIENCE_MS = 20_000;

/** Threads that have done what they were for, and have nothing left of it: to start one takes 170 ms of processor time. */
const idle: Worker[] = [];
/** More than any test has. */
const MOST_IDLE = 4;

function startThread(options: WorkerOptions): Worker {
  const worker = new Worker(script, options);
  worker.on('error', () => {});
  worker.once('exit', () => {
    const at = idle.indexOf(worker);
    if (at >= 0) idle.splice(at, 1);
  });
  return worker;
}

type Answer = { readonly id: number; readonly value?: unknown; readonly error?: string };

export class Host {
  readonly worker: Worker;
  readonly #pending = new Map<number, (answer: Answer) => void>();
  readonly #onMessage = (answer: Answer) => this.#pending.get(answer.id)?.(answer);
  readonly #onExit = () => {
    this.#ended = true;
  };
  #ended = false;
  #nextId = 1;

  /** With `options` a new thread; without, one that another test has had. */
  constructor(options?: WorkerOptions) {
    const used = options === undefined ? idle.pop() : undefined;
    this.worker = used ?? startThread(options ?? {});
    this.worker.ref();
    this.worker.on('exit', this.#onExit);
    this.worker.on('message', this.#onMessage);
    atEnd(async () => {
      if (options === undefined && idle.length < MOST_IDLE && (await this.#letGo())) {
        this.worker.off('exit', this.#onExit);
        this.worker.off('message', this.#onMessage);
        this.worker.unref();
        idle.push(this.worker);
      } else {
        await this.worker.terminate();
      }
    });
  }

  /** Whether the thread has closed what it had. One that is busy is not asked. */
  async #letGo(): Promise<boolean> {
    if (this.#ended || this.#pending.size > 0) return false;
    try {
      await this.do('reset');
      return !this.#ended;
    } catch {
      return false;
    }
  }

  /** Has an action of `worker-host.mjs` done. Rejects with the code of the error there. */
  do(name: string, rest: Record<string, unknown> = {}, transfer: WorkerOptions['transferList'] = []): Promise<unknown> {
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => reject(new Error(`no answer to ${name}`)), PATIENCE_MS);
      this.#pending.set(id, ({ value, error }) => {
        clearTimeout(timer);
        this.#pending.delete(id);
        if (error === undefined) resolve(value);
        else reject(new Error(error));
      });
      this.worker.postMessage({ id, name, ...rest }, transfer);
    });
  }

  /** Opens the queue pair of a handle. */
  async open(handle: QueueHandle): Promise<void> {
    await this.do('open', { handle }, [handle.port]);
  }

  send(index: number, frames: readonly Uint8Array[], sa = 0): Promise<unknown> {
    return this.do('send', { index, frames, sa });
  }

  async receive(index: number, count: number, quiet = 2000): Promise<Received[]> {
    const got = await this.do('receive', { index, count, quiet });
    if (!Array.isArray(got)) throw new Error('no packets');
    return got.map(({ frame, sa, flags }) => ({ frame: Buffer.from(frame), sa, flags }));
  }

  policy(index: number, policy: WaitPolicy): Promise<unknown> {
    return this.do('policy', { index, policy });
  }

  /** Begins to poll without end; see `worker-host.mjs`. */
  spin(index: number, frame: Uint8Array): Spinning {
    const words = new Int32Array(new SharedArrayBuffer(16));
    const ended = this.do('spin', { index, words, frame });
    // Whoever waits for it sees the error.
    ended.catch(() => {});
    return { words, ended };
  }
}

export interface Spinning {
  /** To be set: end, number of the SA to send under; to be read: turns. */
  readonly words: Int32Array;
  /** Code of why the queue was broken, or null. */
  readonly ended: Promise<unknown>;
}

/** Waits for a few more turns of a thread that polls. */
export async function turns({ words }: Spinning, count = 100): Promise<void> {
  const from = Atomics.load(words, 2);
  await until(
    () => ((Atomics.load(words, 2) - from) | 0) >= count,
    () => 'the thread does not turn',
  );
}

/** Hands a queue pair over to a thread of its own, and waits until the NIC knows. */
export async function hire(queue: WorkerQueue, options?: WorkerOptions): Promise<Host> {
  const host = new Host(options);
  await handOver(queue, host);
  return host;
}

export async function handOver(queue: WorkerQueue, host: Host): Promise<void> {
  await host.open(await queue.transfer());
  await until(
    () => queue.state === 'open',
    () => `queue pair ${queue.index} is ${queue.state}`,
  );
}

/** The frame of the way back: addresses and ports the other way round. */
export function reversed(frame: Buffer): Buffer {
  const back = Buffer.from(frame);
  frame.copy(back, 0, 6, 12);
  frame.copy(back, 6, 0, 6);
  frame.copy(back, 26, 30, 34);
  frame.copy(back, 30, 26, 30);
  if (frame[23] === 6 || frame[23] === 17) {
    frame.copy(back, 34, 36, 38);
    frame.copy(back, 36, 34, 36);
  }
  return back;
}

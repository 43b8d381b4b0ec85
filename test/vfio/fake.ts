/** Starts the fake vfio-user server of `fake-server.mjs` and says what it is to do. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { close } from '../../src/sys/libc.ts';

/** Departs from good behaviour for one kind of message. */
export interface Rule {
  readonly command: number;
  /** Only for the nth message of the kind, counted from 1. */
  readonly nth?: number;
  /** Requests of the server's own that it sends before the reply, and after it. */
  readonly before?: readonly Uint8Array[];
  readonly after?: readonly Uint8Array[];
  /** False: do not read replies to `before` and `after`. */
  readonly replies?: boolean;
  /** Changed fields of the reply; `id` is added to the right one, `size` replaces the true one in the header. */
  readonly reply?: {
    id?: number;
    command?: number;
    flags?: number;
    error?: number;
    size?: number;
    payload?: Uint8Array;
    fds?: number[];
  };
  /** Instead of a reply, these bytes (with these descriptors). */
  readonly raw?: Uint8Array;
  readonly fds?: readonly number[];
  /** Sends this request over and over instead of a reply. */
  readonly flood?: Uint8Array;
  /** Sends only so many bytes of the reply and closes. */
  readonly cut?: number;
  /** Sends the reply byte by byte. */
  readonly dribble?: boolean;
  readonly close?: boolean;
  readonly stall?: boolean;
}

export interface FakeRegion {
  readonly index: number;
  /** VFIO_REGION_INFO_FLAG_*, without the one for capabilities. */
  readonly flags: number;
  readonly bytes: Uint8Array;
  /** Capabilities as they follow the region info. */
  readonly caps?: Uint8Array;
  readonly fd?: number;
  readonly offset?: number;
}

export interface FakeDevice {
  readonly capabilities?: unknown;
  readonly flags?: number;
  readonly regionCount?: number;
  readonly irqCount?: number;
  readonly irqFlags?: number;
  readonly vectors?: number;
  readonly regions?: readonly FakeRegion[];
  /** Sent as soon as a client connects. */
  readonly greeting?: string;
}

/** A message as the server saw it. `fds` are open descriptors of this process. */
export interface Seen {
  readonly kind: 'request' | 'reply';
  readonly id: number;
  readonly command: number;
  readonly flags: number;
  readonly error: number;
  readonly payload: Uint8Array;
  readonly fds: readonly number[];
}

export interface Fake {
  readonly path: string;
  /** What the server has seen so far; call after an await. */
  readonly log: Seen[];
  requests(command: number): Seen[];
  replies(): Seen[];
  /** Resolves when the server has seen the end of a connection. */
  closed(): Promise<void>;
  stop(): Promise<void>;
}

const READ_WRITE = 3;

/** 256 bytes of configuration space of a virtio-net function without capabilities. */
export function plainConfig(): Uint8Array {
  const config = new Uint8Array(256);
  config.set([0xf4, 0x1a, 0x41, 0x10, 0, 0, 0, 0, 1, 0, 0, 2]);
  return config;
}

/** Threads whose server has stopped, for the next ones. */
const idle: Worker[] = [];

export async function startFake(rules: readonly Rule[] = [], device: FakeDevice = {}): Promise<Fake> {
  const directory = mkdtempSync(join(tmpdir(), 'fake-vfio-'));
  const path = join(directory, 'socket');
  const stop = new SharedArrayBuffer(4);
  const regions = device.regions ?? [{ index: 0, flags: READ_WRITE, bytes: new Uint8Array(4096) }];
  const withConfig = regions.some((region) => region.index === 7)
    ? regions
    : [...regions, { index: 7, flags: READ_WRITE, bytes: plainConfig() }];
  const setup = {
    path,
    rules,
    stop,
    device: {
      capabilities: { max_msg_fds: 4, max_data_xfer_size: 1048576, max_dma_maps: 65535, pgsizes: 4096 },
      flags: 3,
      regionCount: 9,
      irqCount: 5,
      irqFlags: 1,
      vectors: 6,
      ...device,
      regions: withConfig,
    },
  };
  const log: Seen[] = [];
  let ends = 0;
  let onEnd = () => {};
  const worker = idle.pop() ?? new Worker(new URL('./fake-server.mjs', import.meta.url));
  worker.ref();
  let onListening = () => {};
  let onStopped = () => {};
  let onError: (error: Error) => void = () => {};
  let alive = true;
  const listening = new Promise<void>((resolve, reject) => {
    onListening = resolve;
    onError = reject;
  });
  const stopped = new Promise<void>((resolve) => {
    onStopped = resolve;
  });
  const hear = (message: Seen | { kind: 'listening' } | { kind: 'closed' } | { kind: 'stopped' }): void => {
    if (message.kind === 'listening') onListening();
    else if (message.kind === 'stopped') onStopped();
    else if (message.kind === 'closed') {
      ends++;
      onEnd();
    } else log.push(message);
  };
  const hearEnd = (): void => {
    alive = false;
    onStopped();
  };
  worker.on('message', hear).once('error', onError).once('exit', hearEnd);
  worker.postMessage(setup);
  await listening;
  return {
    path,
    log,
    requests: (command) => log.filter((seen) => seen.kind === 'request' && seen.command === command),
    replies: () => log.filter((seen) => seen.kind === 'reply'),
    closed: () =>
      new Promise((resolve) => {
        onEnd = () => resolve();
        if (ends > 0) resolve();
      }),
    async stop() {
      Atomics.store(new Int32Array(stop), 0, 1);
      await stopped;
      worker.off('message', hear).off('error', onError).off('exit', hearEnd).unref();
      if (alive) idle.push(worker);
      for (const seen of log) for (const fd of seen.fds) close(fd);
      rmSync(directory, { recursive: true, force: true });
    },
  };
}

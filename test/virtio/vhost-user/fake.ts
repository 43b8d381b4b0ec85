/** Starts the vhost-user back-end of `back-end.mjs`, as a thread or as a process, and says what it is to do. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { Feature } from '../../../src/virtio/features.ts';
import { ProtocolFeature } from '../../../src/virtio/vhost-user-protocol.ts';

const program = new URL('back-end.mjs', import.meta.url);

/** Departs from good behaviour for one kind of request. */
export interface Rule {
  readonly request: number;
  /** Only for the nth request of the kind, counted from 1. */
  readonly nth?: number;
  /** Changed fields of the reply; `size` replaces the true one. */
  readonly reply?: { request?: number; flags?: number; size?: number; payload?: readonly number[] };
  /** So many bytes of the reply; with `cut` the socket is closed after them. */
  readonly partial?: number;
  readonly cut?: boolean;
  /** A descriptor comes with the reply. */
  readonly descriptors?: boolean;
  /** The reply comes byte by byte. */
  readonly dribble?: boolean;
  /** Bytes that nobody asked for, after the reply. */
  readonly unasked?: readonly number[];
  /** Signals the error descriptor of every ring afterwards. */
  readonly error?: boolean;
  /** Says that the request failed, when it may say so. */
  readonly refuse?: boolean;
  readonly close?: boolean;
  readonly stall?: boolean;
}

export interface FakeDevice {
  /** Feature bits; `PROTOCOL_FEATURES` (30) is added with `protocol`. */
  readonly features?: readonly number[];
  readonly protocol?: readonly number[];
  readonly queuePairs?: number;
  readonly memorySlots?: number;
  /** Device configuration. */
  readonly config?: readonly number[];
  /** Sent as soon as there is a connection. */
  readonly greeting?: readonly number[];
  /** Moves frames from transmit to receive rings. */
  readonly loop?: boolean;
  /** Writes at most so many bytes to each receive buffer. */
  readonly receivePiece?: number;
}

export interface FakeOptions {
  readonly device?: FakeDevice;
  readonly rules?: readonly Rule[];
  /** The back-end connects to `path`, which the front-end makes. */
  readonly connect?: boolean;
  /** A process that can be killed, rather than a thread. */
  readonly process?: boolean;
}

/** What a back-end tells of itself. */
interface BackEndEvent {
  readonly event: string;
  readonly what?: string;
  readonly request?: number;
  readonly flags?: number;
  readonly payload?: readonly number[];
  readonly descriptors?: number;
}

export interface Message {
  readonly request: number;
  readonly flags: number;
  readonly payload: Uint8Array;
  readonly descriptors: number;
}

export interface FakeBackEnd {
  readonly path: string;
  /** Messages so far; what the front-end has had an answer to is there after an await. */
  readonly messages: Message[];
  /** What the front-end did wrong. */
  readonly violations: string[];
  /** Ends it as a crash would; with `process` by SIGKILL. */
  kill(): Promise<void>;
  /** Waits until the last message has been heard of. */
  settled(): Promise<void>;
}

const STANDARD = [Feature.VERSION_1, Feature.EVENT_IDX, Feature.INDIRECT_DESC];
const ACK = [ProtocolFeature.REPLY_ACK, ProtocolFeature.STATUS];
const PROTOCOL_FEATURES = 30;
const PATIENCE_MS = 10_000;

/** Deadline in ms for a back-end with these rules: one that falls silent is not waited for, another one may be slow. */
export function deadlineFor(rules: readonly Rule[]): number {
  const isSilent = rules.some((rule) => rule.stall === true || (rule.partial !== undefined && rule.cut !== true));
  return isSilent ? 150 : 10_000;
}

const endings: (() => Promise<void>)[] = [];
/** Threads whose back-end has ended, for the next ones. */
const idle: Worker[] = [];

/** Ends every back-end of the test. */
export async function cleanUp(): Promise<void> {
  for (const end of endings.splice(0).reverse()) await end();
}

function bits(set: readonly number[]): string {
  return String(set.reduce((all, bit) => all | (1n << BigInt(bit)), 0n));
}

/** Runs a back-end in a thread that has nothing else to do; resolves when it has ended. */
function inThread(setup: object, hear: (event: BackEndEvent) => void): Promise<void> {
  const worker = idle.pop() ?? new Worker(program);
  worker.ref();
  return new Promise((resolve) => {
    const end = (): void => {
      worker.off('message', onMessage).off('error', onError).off('exit', end).unref();
      resolve();
    };
    const onMessage = (event: BackEndEvent): void => {
      hear(event);
      if (event.event !== 'closed') return;
      end();
      idle.push(worker);
    };
    const onError = (error: unknown): void => hear({ event: 'violation', what: String(error) });
    worker.on('message', onMessage).on('error', onError).on('exit', end);
    worker.postMessage(setup);
  });
}

export async function startBackEnd(options: FakeOptions = {}): Promise<FakeBackEnd> {
  const { device = {}, rules = [], connect = false } = options;
  const directory = mkdtempSync(join(tmpdir(), 'vhost-user-'));
  const path = join(directory, 'port.sock');
  const protocol = device.protocol ?? ACK;
  const features = device.features ?? STANDARD;
  const setup = {
    path,
    connect,
    rules,
    device: {
      ...device,
      features: bits(protocol.length > 0 ? [...features, PROTOCOL_FEATURES] : features),
      protocolFeatures: bits(protocol),
    },
  };
  const messages: Message[] = [];
  const violations: string[] = [];
  let ready = false;
  let ended = false;
  const hear = (event: BackEndEvent): void => {
    if (event.event === 'ready') ready = true;
    if (event.event === 'violation') violations.push(event.what ?? '');
    if (event.event === 'message') {
      const { request = 0, flags = 0, payload = [], descriptors = 0 } = event;
      messages.push({ request, flags, payload: Uint8Array.from(payload), descriptors });
    }
  };
  const stop = new SharedArrayBuffer(4);
  let child: ChildProcess | null = null;
  let gone: Promise<void>;
  if (options.process === true) {
    const started = spawn(process.execPath, [program.pathname, JSON.stringify(setup)], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    child = started;
    let text = '';
    started.stdout.setEncoding('utf8').on('data', (part: string) => {
      const lines = (text + part).split('\n');
      text = lines.pop() ?? '';
      for (const line of lines) hear(JSON.parse(line));
    });
    gone = new Promise((resolve) => started.once('close', () => resolve()));
  } else gone = inThread({ ...setup, stop }, hear);
  void gone.then(() => {
    ended = true;
  });
  const kill = async (): Promise<void> => {
    Atomics.store(new Int32Array(stop), 0, 1);
    child?.kill('SIGKILL');
    await gone;
  };
  endings.push(async () => {
    await kill();
    rmSync(directory, { recursive: true, force: true });
  });
  const deadline = performance.now() + PATIENCE_MS;
  while (!ready) {
    if (ended || performance.now() > deadline) throw new Error(`the back-end did not start: ${violations.join()}`);
    await sleep(1);
  }
  const settled = async (): Promise<void> => {
    for (let last = -1; last !== messages.length; ) {
      last = messages.length;
      await sleep(20);
    }
  };
  return { path, messages, violations, kill, settled };
}

/** Open descriptors of this process. */
export function descriptors(): number {
  return readdirSync('/proc/self/fd').length;
}

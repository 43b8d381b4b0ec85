/**
 * The driver against software devices in another process: starting and stopping them, the wire between two of them, and
 * traffic. Everything that is started here is ended by `cleanUp`, which belongs into an `afterEach`.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { createConnection, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { DeviceRings, FaultName, OctepFault, PersonalityName } from '../../src/device/index.ts';
import { type Nic, type NicOptions, openNic, type SaHandle, type SecurityAssociationInput } from '../../src/index.ts';
import { CaptureReader } from '../../src/packet/capture-file.ts';
import '../equality.ts';
import { deviceHost } from './device-host.ts';

const vipsec = new URL('../../dist/tools/vipsec.js', import.meta.url).pathname;
const captures = new URL('../data/', import.meta.url).pathname;

/** How long anything here may take. */
const PATIENCE_MS = 20_000;

const endings: (() => void | Promise<void>)[] = [];

/** Ends, in reverse order, what the test has started: all of it, whatever fails on the way. */
export async function cleanUp(): Promise<void> {
  const failures: unknown[] = [];
  for (const end of endings.splice(0).reverse()) {
    try {
      await end();
    } catch (error) {
      failures.push(error);
    }
  }
  if (failures.length > 0) throw failures[0];
}

/** Has `end` done by `cleanUp`. */
export function atEnd(end: () => void | Promise<void>): void {
  endings.push(end);
}

/** A new directory that goes with the test. */
export function directory(): string {
  const path = mkdtempSync(join(tmpdir(), 'vipsec-test-'));
  endings.push(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

export interface DeviceSetup {
  /** `vipsec device --link`. */
  readonly link?: string;
  readonly ipsec?: boolean;
  readonly faults?: readonly (FaultName | OctepFault)[];
  readonly personality?: PersonalityName;
  readonly queuePairs?: number;
  /** Virtqueues that drivers may use; default both. */
  readonly rings?: DeviceRings;
  readonly wire?: 'virtio-1.4' | 'rfc-2025-01';
  /** Two functions; with link `pair` unless said otherwise. */
  readonly functions?: 1 | 2;
  /** Address of the first function. */
  readonly mac?: string;
  readonly mtu?: number;
  /** Numbers of the functions that have no IPsec. */
  readonly ipsecOff?: readonly number[];
  /** Of `spawnDevice`: what stands before its command, such as that which enters a namespace. */
  readonly enter?: readonly string[];
}

export interface RunningDevice {
  /** Device addresses for `openNic`. */
  readonly addresses: readonly string[];
  readonly sockets: readonly string[];
}

/** A device among others in the process of this test file. */
export interface HostedDevice extends RunningDevice {
  /** Counters and state of each function. */
  statistics(): Promise<readonly unknown[]>;
  /** Has it ask its drivers to announce themselves. */
  announce(): Promise<void>;
}

/** A device that has its process for itself. */
export interface DeviceProcess extends RunningDevice {
  readonly process: ChildProcess;
  /** Ends it at once, as a crash would. */
  kill(): Promise<void>;
}

function socketPaths(setup: DeviceSetup): string[] {
  const at = directory();
  return Array.from({ length: setup.functions ?? 1 }, (_, i) => join(at, `nic${i + 1}.sock`));
}

const addressOf = (socket: string) => `vfio-user:${socket}`;

/** Starts a device in the process that all devices of a test file share. */
export async function startDevice(setup: DeviceSetup = {}): Promise<HostedDevice> {
  const { functions: _, mac, ipsec = true, ipsecOff = [], ...options } = setup;
  const sockets = socketPaths(setup);
  const device = await deviceHost().start({
    ...options,
    sockets,
    ipsec: sockets.map((_, i) => ipsec && !ipsecOff.includes(i + 1)),
    ...(mac === undefined ? {} : { macs: [mac] }),
  });
  endings.push(() => device.stop());
  const { statistics, announce } = device;
  return { addresses: sockets.map(addressOf), sockets, statistics, announce };
}

/** Starts `vipsec device` and waits until it is ready: for tests that end it. */
export async function spawnDevice(setup: DeviceSetup = {}): Promise<DeviceProcess> {
  const sockets = socketPaths(setup);
  const args = [vipsec, 'device', '--json', ...sockets.flatMap((socket) => ['--socket', socket])];
  if (setup.link !== undefined) args.push('--link', setup.link);
  if (setup.ipsec === false) args.push('--no-ipsec');
  if (setup.queuePairs !== undefined) args.push('--queue-pairs', String(setup.queuePairs));
  if (setup.personality !== undefined) args.push('--personality', setup.personality);
  if (setup.rings !== undefined) args.push('--rings', setup.rings);
  if (setup.wire !== undefined) args.push('--wire', setup.wire);
  if (setup.mac !== undefined) args.push('--mac', setup.mac);
  if (setup.mtu !== undefined) args.push('--mtu', String(setup.mtu));
  for (const n of setup.ipsecOff ?? []) args.push('--ipsec-off', String(n));
  for (const fault of setup.faults ?? []) args.push('--fault', fault);
  const [program, ...rest] = [...(setup.enter ?? []), process.execPath, ...args];
  const child = spawn(program, rest, { stdio: ['ignore', 'pipe', 'pipe'] });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  const ended = new Promise<void>((resolve) => child.once('exit', () => resolve()));
  const kill = async () => {
    child.kill('SIGKILL');
    await ended;
  };
  endings.push(kill);
  await until(
    () => stdout.includes('"ready"') || child.exitCode !== null,
    () => `the device did not start: ${stderr}`,
  );
  if (child.exitCode !== null) throw new Error(`the device ended: ${stderr}`);
  return { addresses: sockets.map(addressOf), sockets, process: child, kill };
}

/** Opens a NIC that is closed with the test. */
export async function open(address: string, options: NicOptions = {}): Promise<Nic> {
  const nic = await openNic(address, options);
  endings.push(() => nic.close());
  return nic;
}

/** Waits until `condition` holds; throws what `otherwise` says after a while. */
export async function until(condition: () => boolean, otherwise: () => string, patience = PATIENCE_MS): Promise<void> {
  const deadline = performance.now() + patience;
  while (!condition()) {
    if (performance.now() >= deadline) throw new Error(otherwise());
    await sleep(1);
  }
}

/** Answers of a device after which it has seen what was on its way to it before. */
const TURNS = 16;

/** Lets the device of `nic` take what was written to its link: each answer is a turn of its event loop, however slow the machine is. */
export async function settled(nic: Nic): Promise<void> {
  for (let turn = 0; turn < TURNS; turn++) {
    void nic.link;
    await sleep(1);
  }
}

/** What happens to a frame on the wire: itself or others, in order. */
export type OnTheWire = (frame: Buffer, from: 'a' | 'b') => readonly Buffer[];

/** The cable between two devices with links `unix:PATH`: all frames go through the test. */
export class Wire {
  /** Frames in the order in which they passed. */
  readonly frames: { readonly from: 'a' | 'b'; readonly frame: Buffer }[] = [];
  onFrame: OnTheWire = (frame) => [frame];
  readonly #ends: Record<'a' | 'b', Socket>;

  private constructor(a: Socket, b: Socket) {
    this.#ends = { a, b };
    this.#relay('a', 'b');
    this.#relay('b', 'a');
  }

  static async between(a: string, b: string): Promise<Wire> {
    const wire = new Wire(await connect(a), await connect(b));
    endings.push(() => wire.cut());
    return wire;
  }

  /** Puts a frame on the wire that no device has sent. */
  inject(frame: Uint8Array, to: 'a' | 'b'): void {
    const framed = Buffer.alloc(4 + frame.length);
    framed.writeUInt32BE(frame.length);
    framed.set(frame, 4);
    this.#ends[to].write(framed);
  }

  cut(): void {
    this.#ends.a.destroy();
    this.#ends.b.destroy();
  }

  #relay(from: 'a' | 'b', to: 'a' | 'b'): void {
    let pending = Buffer.alloc(0);
    this.#ends[from].on('error', () => {});
    this.#ends[from].on('data', (data) => {
      pending = Buffer.concat([pending, data]);
      while (pending.length >= 4) {
        const length = pending.readUInt32BE();
        if (pending.length < 4 + length) break;
        const frame = Buffer.from(pending.subarray(4, 4 + length));
        pending = pending.subarray(4 + length);
        this.frames.push({ from, frame });
        for (const out of this.onFrame(frame, from)) this.inject(out, to);
      }
    });
  }
}

async function connect(path: string): Promise<Socket> {
  await until(
    () => existsSync(path),
    () => `no link at ${path}`,
  );
  return new Promise((resolve, reject) => {
    const socket = createConnection(path, () => resolve(socket));
    socket.once('error', reject);
  });
}

export interface Pair<Device extends RunningDevice = RunningDevice> {
  readonly a: Nic;
  readonly b: Nic;
  readonly deviceA: Device;
  readonly deviceB: RunningDevice;
  readonly wire: Wire;
}

/** A driver that is not told which revision the device speaks finds out. */
export function spoken(setup: DeviceSetup): NicOptions {
  return setup.wire === undefined ? {} : { wire: 'auto' };
}

type PairSetup = DeviceSetup & { nic?: NicOptions };

/** Two NICs of two devices with the test's wire between them. */
export function openPair(a: PairSetup = {}, b: PairSetup = {}): Promise<Pair> {
  return pairOf(startDevice, a, b);
}

/** The same with a first device that can be killed. */
export function spawnPair(a: PairSetup = {}, b: PairSetup = {}): Promise<Pair<DeviceProcess>> {
  return pairOf(spawnDevice, a, b);
}

async function pairOf<Device extends RunningDevice>(
  start: (setup: DeviceSetup) => Promise<Device>,
  { nic: optionsA, ...a }: PairSetup,
  { nic: optionsB, ...b }: PairSetup,
): Promise<Pair<Device>> {
  const links = directory();
  const [linkA, linkB] = [join(links, 'a.sock'), join(links, 'b.sock')];
  const [deviceA, deviceB] = await Promise.all([
    start({ ...a, link: `unix:${linkA}` }),
    startDevice({ ...b, link: `unix:${linkB}` }),
  ]);
  const wire = await Wire.between(linkA, linkB);
  const nicA = await open(deviceA.addresses[0], { ...spoken(a), ...optionsA });
  const nicB = await open(deviceB.addresses[0], { ...spoken(b), ...optionsB });
  return { a: nicA, b: nicB, deviceA, deviceB, wire };
}

/** The frames of a capture in `test/data`, copied. */
export function capture(name: string): Buffer[] {
  const reader = new CaptureReader(join(captures, `${name}.pcap`));
  try {
    return Array.from(reader, (record) => Buffer.from(record.bytes()));
  } finally {
    reader.close();
  }
}

/** Whether a frame is one that an SA should protect: IP, but no neighbour discovery (RFC 4861). */
export function isProtected(frame: Buffer): boolean {
  const type = frame.readUInt16BE(12);
  if (type === 0x0800) return true;
  const discovery = frame[14 + 6] === 58 && frame[14 + 40] >= 133 && frame[14 + 40] <= 137;
  return type === 0x86dd && !discovery;
}

/** Sends frames, each under the SA that `sa` names for it, or in the clear; waits for room. Returns how many were taken. */
export async function send(
  nic: Nic,
  frames: readonly Uint8Array[],
  sa: SaHandle | null | ((frame: Uint8Array) => SaHandle | null),
): Promise<number> {
  const packets = new Uint32Array(32);
  const [{ tx }] = nic.queues;
  let next = 0;
  const deadline = performance.now() + PATIENCE_MS;
  while (next < frames.length && nic.broken === null && performance.now() < deadline) {
    const n = nic.packets.allocate(packets, Math.min(packets.length, frames.length - next));
    for (let i = 0; i < n; i++) {
      const frame = frames[next + i];
      nic.packets.write(packets[i], frame);
      nic.packets.sa[packets[i]] = (typeof sa === 'function' ? sa(frame) : sa)?.handle ?? 0;
    }
    const taken = tx.burst(packets, n);
    nic.packets.free(packets.subarray(taken), n - taken);
    next += taken;
    if (taken < n || n === 0) await sleep(1);
    tx.reclaim();
  }
  return next;
}

export interface Received {
  readonly frame: Buffer;
  readonly sa: number;
  readonly flags: number;
}

/** Takes what arrives until there are `count` frames, or nothing more comes for `quiet` ms after that; a few more may be returned. */
export async function receive(nic: Nic, count: number, quiet = 20): Promise<Received[]> {
  const out: Received[] = [];
  const packets = new Uint32Array(64);
  let last = performance.now();
  const deadline = last + PATIENCE_MS;
  while (performance.now() < deadline) {
    const n = nic.queues[0].rx.burst(packets, packets.length);
    for (let i = 0; i < n; i++) {
      const p = packets[i];
      out.push({ frame: Buffer.from(nic.packets.read(p)), sa: nic.packets.sa[p], flags: nic.packets.flags[p] });
    }
    nic.packets.free(packets, n);
    if (n > 0) last = performance.now();
    else if (nic.broken !== null || (out.length >= count && performance.now() - last >= quiet)) break;
    await sleep(n > 0 ? 0 : 1);
  }
  return out;
}

/** Takes what arrives until `last` does. */
export async function receiveUpTo(nic: Nic, last: Buffer): Promise<Received[]> {
  const out: Received[] = [];
  const deadline = performance.now() + PATIENCE_MS;
  while (!out.some(({ frame }) => frame.equals(last))) {
    if (performance.now() >= deadline) throw new Error(`the last frame did not arrive, ${out.length} others did`);
    out.push(...(await receive(nic, 0, 1)));
  }
  return out;
}

/** Makes the checksum of the IPv4 header at 14 right again. */
export function fixChecksum(frame: Buffer): void {
  frame.writeUInt16BE(0, 24);
  let sum = 0;
  for (let at = 14; at < 34; at += 2) sum += frame.readUInt16BE(at);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  frame.writeUInt16BE(~sum & 0xffff, 24);
}

let keys = 0;

/** A key that no other SA of this test process has. */
export function freshKey(length = 16): string {
  keys++;
  return Buffer.alloc(length, keys & 0xff)
    .fill(keys >>> 8, 0, 1)
    .toString('hex');
}

/** Both ends of one direction: what one side sends with and the other receives with. */
export function saPair(
  change: Partial<SecurityAssociationInput> = {},
  ipv6 = false,
): { outbound: SecurityAssociationInput; inbound: SecurityAssociationInput } {
  const [source, destination] = ipv6 ? ['2001:db8::1', '2001:db8::2'] : ['192.0.2.1', '192.0.2.2'];
  const spi = 0x1000 + keys;
  const aead = { name: 'aes-gcm', key: freshKey(), salt: '01020304' } as const;
  const algorithms = change.cipher === undefined && change.auth === undefined ? { aead } : {};
  const tunnel = (change.mode ?? 'tunnel') === 'tunnel' ? { tunnel: { source, destination } } : {};
  const common = { mode: 'tunnel', spi, ...algorithms, ...tunnel, ...change } as const;
  return { outbound: { ...common, direction: 'outbound' }, inbound: { ...common, direction: 'inbound' } };
}

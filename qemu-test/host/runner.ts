/** Runs one scenario: its sockets, its device processes, QEMU, its host half; collects what came out. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Components } from '../fetch/components.ts';
import { describe } from '../guest/guest.ts';
import type { GuestImage } from '../image/build.ts';
import { type GuestMessage, parseGuestMessage } from '../messages.ts';
import type { Scenario, SoftwareNic } from '../scenario.ts';
import { consoleFaults } from './faults.ts';
import { FramePort } from './frames.ts';
import { Host } from './host.ts';
import { commandLine, controlSocket, deviceSocket, linkSocket, qmpSocket } from './machine.ts';
import { lineSplitter } from './process.ts';
import { Qmp } from './qmp.ts';
import type { TapSupport } from './taps.ts';

const CONSOLE_LINES = 40;
/** From the start of QEMU to the first word of the guest; 5 s when nothing else runs. */
const BOOT_MS = 90_000;
const NO_HELLO = `no word from the guest after ${BOOT_MS / 1000} s`;
const POWERED_OFF = 'QEMU ended with 0';
const DEVICE_START_MS = 60_000;
const STOP_MS = 3_000;

export interface CheckResult {
  readonly name: string;
  readonly verdict: 'pass' | 'fail' | 'not run';
  readonly detail: string;
  readonly ms: number;
}

export interface ScenarioResult {
  readonly name: string;
  readonly title: string;
  readonly passed: boolean;
  readonly seconds: number;
  /** Why the machine was started again: what ended its first start before the scenario began. */
  readonly restarted: string | null;
  /** Why this system cannot run it; then nothing was checked. */
  readonly obstacle: string | null;
  readonly checks: readonly CheckResult[];
  /** What went wrong beside the checks: a time-out, a crash, an IOMMU fault on the console. */
  readonly problems: readonly string[];
  /** The end of the guest's console. */
  readonly console: readonly string[];
}

export interface RunnerOptions {
  readonly components: Components;
  readonly image: GuestImage;
  readonly dist: string;
  readonly guestDist: string;
  /** How taps are had; needed by scenarios with a tap. */
  readonly taps?: TapSupport | undefined;
  readonly interactive: boolean;
  /** Folder for captures of the frames of QEMU's functions. */
  readonly capture?: string | undefined;
  readonly signal: AbortSignal;
  readonly onCheck?: (scenario: string, check: string) => void;
}

/**
 * Runs a scenario. An emulated machine that does not get as far as the scenario (hung or in panic in the kernel's first seconds, seen now
 * and then under load) is started once more, and the result says so. A scenario that has begun is never run again.
 */
export async function runScenario(name: string, scenario: Scenario, options: RunnerOptions): Promise<ScenarioResult> {
  const started = performance.now();
  const first = await runOnce(name, scenario, options);
  const again = first.bootFailure !== null && !options.signal.aborted;
  const run = again ? await runOnce(name, scenario, options) : first;
  return run.result((performance.now() - started) / 1000, again ? first.bootFailure : null);
}

async function runOnce(name: string, scenario: Scenario, options: RunnerOptions): Promise<ScenarioRun> {
  const run = new ScenarioRun(name, scenario, options);
  try {
    await run.execute();
  } catch (error) {
    run.problems.push(describe(error));
  } finally {
    await run.cleanUp();
  }
  return run;
}

class ScenarioRun {
  readonly problems: string[] = [];
  /** Why the guest did not get as far as to say hello, though QEMU ran; null when it did. */
  bootFailure: string | null = null;
  readonly #name: string;
  readonly #scenario: Scenario;
  readonly #options: RunnerOptions;
  readonly #checks = new Map<string, CheckResult>();
  readonly #console: string[] = [];
  readonly #cleanUps: (() => unknown)[] = [];
  readonly #ended = new AbortController();
  readonly #hello = new AbortController();
  #current = '';
  #finished = false;

  constructor(name: string, scenario: Scenario, options: RunnerOptions) {
    this.#name = name;
    this.#scenario = scenario;
    this.#options = options;
  }

  async execute(): Promise<void> {
    const { devices, timeout, host: hostBody } = this.#scenario;
    const sockets = await mkdtemp(join(tmpdir(), 'vipsec-qemu-'));
    this.#cleanUps.push(() => rm(sockets, { recursive: true, force: true }));
    const links = new Map<string, FramePort>();
    for (const device of devices) {
      const path = linkSocket(sockets, device.id);
      if (device.kind === 'vfio-user') await this.#startDevice(device, sockets);
      if (device.link !== 'host') continue;
      links.set(device.id, device.kind === 'vfio-user' ? await FramePort.connect(path) : await FramePort.listen(path));
    }
    const qmp = await Qmp.listen(qmpSocket(sockets));
    this.#cleanUps.push(() => qmp.close(), ...[...links.values()].map((port) => () => port.close()));
    const send = await this.#listenForGuest(controlSocket(sockets), (topic, body) => host.mailbox.put(topic, body));
    const host: Host = new Host({
      links,
      qmp,
      send,
      setLink: async (id, up) => {
        const device = devices.find((other) => other.id === id);
        if (device?.kind === 'virtio-net') await qmp.execute('set_link', { name: id, up });
        else if (up) await links.get(id)?.plug();
        else links.get(id)?.unplug();
      },
      ended: this.#ended.signal,
      check: (name, body) => this.#hostCheck(name, body),
    });
    const hostDone = hostBody === undefined ? undefined : this.#runHost(hostBody.bind(this.#scenario), host);
    await this.#runQemu(sockets, timeout);
    this.#ended.abort();
    for (const port of links.values()) port.fail(new Error('the guest has ended'));
    await hostDone;
  }

  async cleanUp(): Promise<void> {
    this.#ended.abort();
    for (const cleanUp of this.#cleanUps.reverse()) await cleanUp();
  }

  result(seconds: number, restarted: string | null): ScenarioResult {
    const { title, checks: expected, allowedFaults = [] } = this.#scenario;
    const checks = expected.map(
      (name): CheckResult => this.#checks.get(name) ?? { name, verdict: 'not run', detail: '', ms: 0 },
    );
    for (const name of this.#checks.keys()) {
      if (!expected.includes(name)) this.problems.push(`check '${name}' is not in the scenario's list`);
    }
    for (const line of consoleFaults(this.#console, allowedFaults)) this.problems.push(`on the console: ${line}`);
    const passed = this.problems.length === 0 && checks.every((check) => check.verdict === 'pass');
    const console = this.#console.slice(-CONSOLE_LINES);
    return {
      name: this.#name,
      title,
      passed,
      seconds,
      restarted,
      obstacle: null,
      checks,
      problems: this.problems,
      console,
    };
  }

  /** Starts `vipsec device` and waits until its socket is there, or the two of a pair. */
  async #startDevice({ id, link, args: more = [] }: SoftwareNic, sockets: string): Promise<void> {
    const socket = deviceSocket(sockets, id);
    // The process of its partner has it.
    if (typeof link === 'object' && existsSync(socket)) return;
    const paths = typeof link === 'object' ? [socket, deviceSocket(sockets, link.pair)] : [socket];
    const target =
      typeof link === 'object' ? 'pair' : link === 'loopback' ? 'loopback' : `unix:${linkSocket(sockets, id)}`;
    const program = join(this.#options.dist, 'tools/vipsec.js');
    const args = ['device', ...paths.flatMap((path) => ['--socket', path]), '--link', target, ...more];
    const child = spawn(process.execPath, [program, ...args], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    let complaint = '';
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      complaint = (complaint + text).slice(-2000);
    });
    let stopping = false;
    child.once('exit', (code, signal) => {
      if (!stopping) this.problems.push(`device ${id} ended with ${code ?? signal}: ${complaint.trim()}`);
    });
    this.#cleanUps.push(() => {
      stopping = true;
      return stop(child);
    });
    const isThere = () => paths.every((path) => existsSync(path));
    for (const deadline = Date.now() + DEVICE_START_MS; !isThere(); await sleep(20)) {
      if (child.exitCode !== null) throw new Error(`device ${id} does not start: ${complaint.trim()}`);
      if (Date.now() > deadline) throw new Error(`device ${id} has no socket after ${DEVICE_START_MS} ms`);
    }
  }

  /** Opens the line to the guest; returns the function that sends notes. */
  async #listenForGuest(
    path: string,
    onNote: (topic: string, body: unknown) => void,
  ): Promise<(topic: string, body: unknown) => void> {
    let guest: Socket | undefined;
    const server = createServer((socket) => {
      guest = socket;
      const split = lineSplitter((line) => {
        const message = parseGuestMessage(line);
        if (message === undefined) this.problems.push(`the guest sent what is no message: ${line.slice(0, 200)}`);
        else if (message.type === 'note') onNote(message.topic, message.body);
        else this.#heard(message);
      });
      socket.setEncoding('utf8').on('data', (text) => split(String(text)));
      socket.on('error', () => socket.destroy());
    });
    server.listen(path);
    await once(server, 'listening');
    this.#cleanUps.push(() => {
      guest?.destroy();
      server.close();
    });
    return (topic, body) => {
      guest?.write(`${JSON.stringify({ type: 'note', topic, body })}\n`);
    };
  }

  #heard(message: Exclude<GuestMessage, { type: 'note' }>): void {
    if (message.type === 'hello') this.#hello.abort();
    if (message.type === 'begin') this.#begin(message.check);
    if (message.type === 'check') this.#record(message.check, message.ok, message.detail, message.ms);
    if (message.type === 'exit') this.problems.push(`the guest's process ended with ${message.status}`);
    if (message.type !== 'end') return;
    this.#finished = true;
    if (message.error !== null) this.problems.push(`the guest's half failed: ${message.error}`);
  }

  #begin(check: string): void {
    this.#current = check;
    this.#options.onCheck?.(this.#name, check);
  }

  #record(name: string, ok: boolean, detail: string, ms: number): void {
    if (this.#checks.has(name)) this.problems.push(`check '${name}' was made twice`);
    this.#checks.set(name, { name, verdict: ok ? 'pass' : 'fail', detail, ms });
    if (this.#current === name) this.#current = '';
  }

  async #hostCheck(name: string, body: () => unknown): Promise<boolean> {
    const started = performance.now();
    let ok = true;
    let detail = '';
    try {
      const result = await body();
      if (result !== undefined) detail = String(result);
    } catch (error) {
      ok = false;
      detail = describe(error);
    }
    this.#record(name, ok, detail, Math.round(performance.now() - started));
    return ok;
  }

  async #runHost(body: (host: Host) => Promise<void>, host: Host): Promise<void> {
    try {
      await body(host);
    } catch (error) {
      this.problems.push(`the host's half failed: ${describe(error)}`);
    }
  }

  async #runQemu(sockets: string, timeout: number): Promise<void> {
    const { components, image, dist, guestDist, taps, interactive, capture, signal } = this.#options;
    const paths = { image, sockets, dist, guestDist, capture, taps };
    const line = commandLine(this.#name, this.#scenario, components, paths, interactive);
    const child = spawn(line.command, line.args, {
      env: { ...process.env, ...line.env },
      stdio: interactive ? 'inherit' : ['ignore', 'pipe', 'pipe'],
    });
    const failed = once(child, 'error').then(([error]) => Promise.reject(error));
    this.#cleanUps.push(() => stop(child));
    let complaint = '';
    const split = lineSplitter((text) => this.#console.push(text.trimEnd()));
    child.stdout?.setEncoding('utf8').on('data', split);
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      complaint = (complaint + text).slice(-2000);
    });
    // `close` and not `exit`: the end of the console is wanted too.
    const over = once(child, 'close').then(([code, signal]) => `QEMU ended with ${code ?? signal}`);
    const outcome = await Promise.race([over, failed, interactive ? over : this.#wait(timeout, signal)]);
    // A panic ends QEMU as a power-off does.
    const isBootFailure = outcome === NO_HELLO || outcome === POWERED_OFF;
    if (isBootFailure && !interactive && !this.#hello.signal.aborted) {
      this.bootFailure = this.#console.find((text) => text.includes('Kernel panic')) ?? NO_HELLO;
    }
    if (outcome !== POWERED_OFF) this.problems.push(`${outcome}${complaint === '' ? '' : `: ${complaint.trim()}`}`);
    else if (!this.#finished && !interactive) this.problems.push('the guest powered off before the scenario was over');
  }

  /** Returns what is wrong once the guest has had its time to boot, or the scenario its time to run. */
  async #wait(timeout: number, stopped: AbortSignal): Promise<string> {
    const started = Date.now();
    const limit = AbortSignal.any([this.#ended.signal, stopped]);
    const sleepUntil = (ms: number, signal: AbortSignal) =>
      sleep(started + ms - Date.now(), true, { signal }).catch(() => false);
    const silent = await sleepUntil(BOOT_MS, AbortSignal.any([limit, this.#hello.signal]));
    if (silent) return NO_HELLO;
    const late = !limit.aborted && (await sleepUntil(timeout * 1000, limit));
    const where = this.#current === '' ? '' : ` in check '${this.#current}'`;
    return late ? `not over after ${timeout} s${where}` : 'stopped';
  }
}

/** Ends a process: politely, then not. */
async function stop(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null || child.pid === undefined) return;
  const over = once(child, 'exit');
  child.kill('SIGTERM');
  const timer = setTimeout(() => child.kill('SIGKILL'), STOP_MS);
  await over;
  clearTimeout(timer);
}

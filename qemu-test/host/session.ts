/**
 * One guest: its sockets, the device processes of all its scenarios, QEMU; and the scenarios, which run in it one after the other, each with
 * its host half, its time and its part of the console.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Components } from '../fetch/components.ts';
import { describe } from '../guest/guest.ts';
import type { GuestImage } from '../image/build.ts';
import { type GuestMessage, lastLine } from '../messages.ts';
import type { NamedScenario, ScenarioDevice } from '../scenario.ts';
import { DeviceProcess } from './device.ts';
import { FramePort } from './frames.ts';
import { GuestLine } from './guest-line.ts';
import { Host } from './host.ts';
import { commandLine, controlSocket, deviceSocket, firstPlace, linkSocket, qmpSocket, unique } from './machine.ts';
import { lineSplitter, stop } from './process.ts';
import { Qmp } from './qmp.ts';
import { type ScenarioResult, ScenarioRun } from './scenario-run.ts';
import type { TapSupport } from './taps.ts';

/** From the start of QEMU to the first word of the guest; 5 s when nothing else runs. */
const BOOT_MS = 90_000;
/** For the host's half to end by itself when the guest's has. */
const HOST_MS = 10_000;
/** For the console's last line to arrive when the guest has said that it was written. */
const CONSOLE_MS = 5_000;
const COMPLAINT = 2000;
const POWERED_OFF = 'QEMU ended with 0';

export interface SessionOptions {
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

/** The guest did not get as far as its first scenario. */
export class BootError extends Error {
  /** It hung or was in panic, which emulation makes happen now and then: another start may go well. */
  readonly isChance: boolean;
  /** The scenario whose device does not start; undefined when it is not known to be one scenario's affair. */
  readonly scenario: string | undefined;
  readonly console: readonly string[];

  constructor(message: string, about: { isChance?: boolean; scenario?: string; console?: readonly string[] } = {}) {
    super(message);
    this.name = 'BootError';
    this.isChance = about.isChance ?? false;
    this.scenario = about.scenario;
    this.console = about.console ?? [];
  }
}

export class Session {
  readonly #scenarios: readonly NamedScenario[];
  readonly #options: SessionOptions;
  readonly #links = new Map<string, FramePort>();
  readonly #done: string[] = [];
  readonly #cleanUps: (() => unknown)[] = [];
  readonly #closing = new AbortController();
  readonly #consoleWaiters = new Set<(line: string) => void>();
  #run: ScenarioRun | undefined;
  #host: Host | undefined;
  /** Of the boot, and what came between two scenarios: the next one gets it. */
  #console: string[] = [];
  #problems: string[] = [];
  #line: GuestLine | undefined;
  #qmp: Qmp | undefined;
  #ready: () => void = () => {};
  /** What ended QEMU. */
  #ended: Promise<string> = Promise.resolve('QEMU was not started');

  private constructor(scenarios: readonly NamedScenario[], options: SessionOptions) {
    this.#scenarios = scenarios;
    this.#options = options;
  }

  /** Boots a guest that has all that `scenarios` need. Throws BootError. */
  static async boot(scenarios: readonly NamedScenario[], options: SessionOptions): Promise<Session> {
    const session = new Session(scenarios, options);
    try {
      await session.#boot();
    } catch (error) {
      await session.close();
      throw error;
    }
    return session;
  }

  /** Runs one of the scenarios. Unless it passes, the guest is not fit for another. */
  async run(scenario: NamedScenario, restarted: string | null): Promise<ScenarioResult> {
    const { signal, interactive, onCheck } = this.#options;
    const { name } = scenario;
    const started = performance.now();
    const run = new ScenarioRun(scenario, (check) => onCheck?.(name, check));
    run.console.push(...this.#console.splice(0));
    run.problems.push(...this.#problems.splice(0));
    const guestEnded = new AbortController();
    this.#host = this.#hostOf(scenario, run, guestEnded.signal);
    this.#run = run;
    const hostOver = this.#runHost(scenario, run, this.#host);
    const lastOnConsole = this.#onConsole(lastLine(name));
    this.#line?.send({ type: 'run', scenario: name, first: firstPlace(this.#scenarios, name) });
    const limit = AbortSignal.any([guestEnded.signal, signal]);
    const late = interactive
      ? new Promise<string>(() => {})
      : sleep(scenario.scenario.timeout * 1000, null, { signal: limit }).then(
          () =>
            `not over after ${scenario.scenario.timeout} s${run.current === '' ? '' : ` in check '${run.current}'`}`,
          () => 'stopped',
        );
    const ended = this.#ended.then((how) =>
      how === POWERED_OFF ? 'the guest powered off before the scenario was over' : how,
    );
    const problem = await Promise.race([run.over.then(() => null), ended, late]);
    if (problem === null) {
      // What the host's half still does it has been told to do.
      await Promise.race([hostOver, sleep(HOST_MS, null, { ref: false })]);
      if (!interactive) await Promise.race([lastOnConsole, this.#ended, sleep(CONSOLE_MS, null, { ref: false })]);
    } else {
      run.problems.push(problem);
    }
    guestEnded.abort();
    for (const { id } of scenario.scenario.devices) {
      this.#links.get(unique(name, id))?.fail(new Error("the guest's half has ended"));
    }
    await hostOver;
    this.#run = undefined;
    this.#host = undefined;
    const before = [...this.#done];
    this.#done.push(name);
    return run.result((performance.now() - started) / 1000, restarted, before);
  }

  /** Runs `scenario` each time that the person at the guest's shell asks for it, until QEMU ends. */
  async interact(scenario: NamedScenario): Promise<void> {
    for (;;) {
      const { passed, problems } = await this.run(scenario, null);
      this.#line?.send({ type: 'over' });
      const again = new Promise<boolean>((resolve) => {
        this.#ready = () => resolve(true);
      });
      process.stderr.write([passed ? 'pass' : 'FAIL', ...problems, ''].join('\r\n'));
      if (!(await Promise.race([again, this.#ended.then(() => false)]))) return;
    }
  }

  async close(): Promise<void> {
    this.#closing.abort();
    for (const cleanUp of this.#cleanUps.splice(0).reverse()) await cleanUp();
  }

  async #boot(): Promise<void> {
    const sockets = await mkdtemp(join(tmpdir(), 'vipsec-qemu-'));
    this.#cleanUps.push(() => rm(sockets, { recursive: true, force: true }));
    await Promise.all(this.#scenarios.map((scenario) => this.#startDevices(scenario, sockets)));
    this.#qmp = await Qmp.listen(qmpSocket(sockets));
    this.#line = await GuestLine.listen(
      controlSocket(sockets),
      (message) => this.#heard(message),
      (text) => this.#problem(`the guest sent what is no message: ${text}`),
    );
    this.#cleanUps.push(
      () => this.#qmp?.close(),
      () => this.#line?.close(),
      ...[...this.#links.values()].map((port) => () => port.close()),
    );
    const ready = new Promise<null>((resolve) => {
      this.#ready = () => resolve(null);
    });
    this.#ended = this.#startQemu(sockets);
    const { signal, interactive } = this.#options;
    const limit = AbortSignal.any([this.#closing.signal, signal]);
    const hung = new Promise<string>((resolve) => {
      if (interactive) return;
      sleep(BOOT_MS, null, { signal: limit }).then(
        () => resolve(`no word from the guest after ${BOOT_MS / 1000} s`),
        () => resolve('stopped'),
      );
    });
    const problem = await Promise.race([ready, hung, this.#ended]);
    if (problem === null) return;
    const panic = this.#console.find((text) => text.includes('Kernel panic'));
    // A panic ends QEMU as a power-off does.
    const isChance = !interactive && (problem === POWERED_OFF || problem.startsWith('no word'));
    throw new BootError(panic ?? problem, { isChance, console: this.#console });
  }

  async #startDevices({ name, scenario }: NamedScenario, sockets: string): Promise<void> {
    const { dist } = this.#options;
    for (const device of scenario.devices) {
      const link = linkSocket(sockets, unique(name, device.id));
      try {
        if (device.kind === 'vfio-user' && !isSecondOfPair(scenario.devices, device)) {
          const ids = typeof device.link === 'object' ? [device.id, device.link.pair] : [device.id];
          const target = ids.length > 1 ? 'pair' : device.link === 'loopback' ? 'loopback' : `unix:${link}`;
          const started = await DeviceProcess.start({
            dist,
            sockets: ids.map((id) => deviceSocket(sockets, unique(name, id))),
            link: target,
            args: device.args ?? [],
            onEnd: (reason) => this.#problem(`device ${device.id} of ${name} ${reason}`),
          });
          this.#cleanUps.push(() => started.stop());
        }
        if (device.link !== 'host') continue;
        const port = device.kind === 'vfio-user' ? await FramePort.connect(link) : await FramePort.listen(link);
        this.#links.set(unique(name, device.id), port);
      } catch (error) {
        throw new BootError(`device ${device.id} ${describe(error)}`, { scenario: name });
      }
    }
  }

  /** Starts QEMU; what ends it, in the end. */
  #startQemu(sockets: string): Promise<string> {
    const { components, image, dist, guestDist, taps, interactive, capture } = this.#options;
    const paths = { image, sockets, dist, guestDist, capture, taps };
    const line = commandLine(this.#scenarios, components, paths, interactive);
    const child: ChildProcess = spawn(line.command, line.args, {
      env: { ...process.env, ...line.env },
      stdio: interactive ? 'inherit' : ['ignore', 'pipe', 'pipe'],
    });
    this.#cleanUps.push(() => stop(child));
    const split = lineSplitter((text) => {
      (this.#run?.console ?? this.#console).push(text.trimEnd());
      for (const waiter of this.#consoleWaiters) waiter(text);
    });
    let complaint = '';
    child.stdout?.setEncoding('utf8').on('data', split);
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      complaint = (complaint + text).slice(-COMPLAINT);
    });
    return new Promise((resolve) => {
      child.once('error', (error) => resolve(`QEMU does not start: ${error.message}`));
      // `close` and not `exit`: the end of the console is wanted too.
      child.once('close', (code, signal) => {
        const how = `QEMU ended with ${code ?? signal}`;
        resolve(how === POWERED_OFF || complaint === '' ? how : `${how}: ${complaint.trim()}`);
      });
    });
  }

  #heard(message: GuestMessage): void {
    if (message.type === 'ready') this.#ready();
    else if (message.type === 'note') this.#host?.mailbox.put(message.topic, message.body);
    else if (this.#run !== undefined) this.#run.heard(message);
    else this.#problem(`between two scenarios the guest said ${JSON.stringify(message)}`);
  }

  #problem(text: string): void {
    (this.#run?.problems ?? this.#problems).push(text);
  }

  #onConsole(wanted: string): Promise<void> {
    return new Promise((resolve) => {
      const waiter = (line: string) => {
        if (!line.includes(wanted)) return;
        this.#consoleWaiters.delete(waiter);
        resolve();
      };
      this.#consoleWaiters.add(waiter);
    });
  }

  #hostOf({ name, scenario }: NamedScenario, run: ScenarioRun, ended: AbortSignal): Host {
    const own = scenario.devices.map(({ id }) => [id, this.#links.get(unique(name, id))] as const);
    return new Host({
      links: new Map(own.flatMap(([id, port]) => (port === undefined ? [] : [[id, port]]))),
      setLink: async (id, up) => {
        const device = scenario.devices.find((other) => other.id === id);
        const port = this.#links.get(unique(name, id));
        if (device?.kind === 'virtio-net') await this.#qmp?.execute('set_link', { name: unique(name, id), up });
        else if (up) await port?.plug();
        else port?.unplug();
      },
      unplug: async (id) => this.#qmp?.execute('device_del', { id: unique(name, id) }),
      send: (topic, body) => this.#line?.send({ type: 'note', topic, body }),
      ended,
      check: (check, body) => run.check(check, body),
    });
  }

  async #runHost({ scenario }: NamedScenario, run: ScenarioRun, host: Host): Promise<void> {
    try {
      await scenario.host?.(host);
    } catch (error) {
      run.problems.push(`the host's half failed: ${describe(error)}`);
    }
  }
}

/** Whether the process of its partner, which is named before, has it. */
function isSecondOfPair(devices: readonly ScenarioDevice[], device: ScenarioDevice): boolean {
  const { link } = device;
  if (typeof link !== 'object' || !('pair' in link)) return false;
  return devices.findIndex(({ id }) => id === link.pair) < devices.indexOf(device);
}

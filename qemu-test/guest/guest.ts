/** What a scenario can do inside the guest: make checks, run commands, talk to its other half on the host. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { GuestMessage, Mailbox } from '../messages.ts';
import { type ScenarioDevice, slotOf } from '../scenario.ts';

export interface CommandResult {
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** What ends the waiting is the scenario's time. */
const NOTE_TIMEOUT_MS = 3_600_000;
const COMMAND_TIMEOUT_MS = 120_000;
/** Device k of the machine is in slot 0x10 + k of the root bus, or behind a root port there. `machine.ts` places them so. */
export const FIRST_ROOT_PORT_SLOT = 0x10;
/** The base of the image is in the slot above them. */
export const MAX_DEVICES = 14;

export class Guest {
  readonly #send: (message: GuestMessage) => void;
  readonly #mailbox: Mailbox;
  readonly #devices: readonly ScenarioDevice[];
  /** Place of the scenario's first device among those of the machine. */
  readonly #first: number;
  /** Folder of the built package inside the guest. */
  readonly dist: string;

  constructor(
    send: (message: GuestMessage) => void,
    mailbox: Mailbox,
    devices: readonly ScenarioDevice[],
    dist: string,
    first: number,
  ) {
    this.#send = send;
    this.#mailbox = mailbox;
    this.#devices = devices;
    this.dist = dist;
    this.#first = first;
  }

  /**
   * Makes check `name`: it passes when `body` does not throw; what it returns is shown as its result. Returns whether it
   * passed, so that what cannot work without it can be left out (and is then reported as not run).
   */
  async check(name: string, body: () => unknown): Promise<boolean> {
    this.#send({ type: 'begin', check: name });
    const outcome = await outcomeOf(body);
    this.#send({ type: 'check', check: name, ...outcome });
    return outcome.ok;
  }

  /** Runs a shell command to its end. */
  sh(command: string, input = ''): CommandResult {
    const result = spawnSync('sh', ['-c', `. /etc/shrc; ${command}`], {
      encoding: 'utf8',
      input,
      timeout: COMMAND_TIMEOUT_MS,
    });
    if (result.error !== undefined) throw result.error;
    return { status: result.status ?? -1, stdout: result.stdout, stderr: result.stderr };
  }

  /** Runs a shell command that must succeed; returns what it printed. */
  must(command: string, input = ''): string {
    const { status, stdout, stderr } = this.sh(command, input);
    if (status !== 0) throw new Error(`'${command}' ended with ${status}: ${stderr || stdout}`.trim());
    return stdout;
  }

  /** The command that runs a program of the built package (a path below its folder), with what Node was told for this process. */
  nodeCommand(program: string, args: readonly string[]): [string, ...string[]] {
    return [process.execPath, ...process.execArgv, join(this.dist, program), ...args];
  }

  /** Starts a program of the built package as a process of its own. */
  spawnNode(program: string, args: readonly string[]): ChildProcess {
    const [command, ...rest] = this.nodeCommand(program, args);
    return spawn(command, rest, { stdio: ['pipe', 'pipe', 'inherit'] });
  }

  /** Runs a program of the built package to its end. `user`: as that uid; `lockedMemory`: with that limit, in KiB. */
  node(program: string, args: readonly string[], as: { user?: number; lockedMemory?: number } = {}): CommandResult {
    const limit = as.lockedMemory === undefined ? '' : `ulimit -l ${as.lockedMemory}; `;
    const result = spawnSync('sh', ['-c', `${limit}exec "$0" "$@"`, ...this.nodeCommand(program, args)], {
      encoding: 'utf8',
      timeout: COMMAND_TIMEOUT_MS,
      ...(as.user === undefined ? {} : { uid: as.user, gid: as.user }),
    });
    if (result.error !== undefined) throw result.error;
    return { status: result.status ?? -1, stdout: result.stdout, stderr: result.stderr };
  }

  /** PCI address of the scenario's device `id`. */
  address(id: string): string {
    const index = this.#devices.findIndex((device) => device.id === id);
    if (index < 0) throw new Error(`the scenario has no device ${id}`);
    const { slot, fn } = slotOf(this.#devices, index);
    const onRoot = `0000:00:${(FIRST_ROOT_PORT_SLOT + this.#first + slot).toString(16)}.0`;
    const behind = readdirSync(`/sys/bus/pci/devices/${onRoot}`).filter((name) =>
      /^0000:[0-9a-f]{2}:00\.\d$/.test(name),
    );
    return behind.find((name) => name.endsWith(`.${fn}`)) ?? onRoot;
  }

  /** Name of the kernel's network interface on device `id`, while a kernel driver has it. */
  interface(id: string): string {
    const device = `/sys/bus/pci/devices/${this.address(id)}`;
    const virtio = readdirSync(device).find((name) => /^virtio\d+$/.test(name));
    const name = virtio === undefined ? undefined : readdirSync(join(device, virtio, 'net'))[0];
    if (name === undefined) throw new Error(`no network interface on ${id}`);
    return name;
  }

  /** A file of sysfs or procfs, without the newline. */
  read(path: string): string {
    return readFileSync(path, 'utf8').trim();
  }

  tell(topic: string, body: unknown = null): void {
    this.#send({ type: 'note', topic, body });
  }

  hear(topic: string, timeoutMs = NOTE_TIMEOUT_MS): Promise<unknown> {
    return this.#mailbox.take(topic, timeoutMs);
  }
}

export interface CheckOutcome {
  readonly ok: boolean;
  /** What the check returned, or why it failed. */
  readonly detail: string;
  readonly ms: number;
}

/** Makes a check, on either side: it passes when `body` does not throw. */
export async function outcomeOf(body: () => unknown): Promise<CheckOutcome> {
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
  return { ok, detail, ms: Math.round(performance.now() - started) };
}

/** An error as one line with its code and hint. */
export function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const code = 'code' in error ? ` [${String(error.code)}]` : '';
  const place = error.stack?.split('\n').find((line) => /^\s+at /.test(line) && !line.includes('node:'));
  return `${error.message}${code}${place === undefined ? '' : ` (${place.trim()})`}`;
}

/** Runs `body`, which must throw an error with `code`; returns its message and hint. */
export async function mustFail(code: string, body: () => unknown): Promise<string> {
  try {
    await body();
  } catch (error) {
    if (!(error instanceof Error) || !('code' in error) || error.code !== code) throw error;
    const hint = 'hint' in error && typeof error.hint === 'string' ? ` (${error.hint})` : '';
    return `${error.message}${hint}`;
  }
  throw new Error(`it worked, but ${code} was expected`);
}

/** Throws when two values are not equal, naming both. */
export function same(what: string, got: unknown, wanted: unknown): void {
  const [a, b] = [JSON.stringify(got), JSON.stringify(wanted)];
  if (a !== b) throw new Error(`${what} is ${a}, not ${b}`);
}

/**
 * A network namespace of the test's own (network_namespaces(7)): its interfaces and addresses are nobody else's, and go with it. Takes user
 * namespaces, or root.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import type { Outcome } from './vipsec.ts';

/** How to get one: as root it may be had without a user namespace where those are forbidden. */
const WAYS = [
  { unshare: ['--user', '--map-root-user', '--net'], nsenter: ['--user', '--net'] },
  { unshare: ['--net'], nsenter: ['--net'] },
] as const;

export class Namespace {
  /** What stands before a command to run it in the namespace. */
  readonly enter: readonly string[];
  readonly #holder: ChildProcess;

  private constructor(holder: ChildProcess, enter: readonly string[]) {
    this.#holder = holder;
    this.enter = enter;
  }

  /** Throws Error, with the reasons, where namespaces are not allowed. */
  static async open(): Promise<Namespace> {
    const reasons: string[] = [];
    for (const { unshare, nsenter } of WAYS) {
      // It ends with its standard input, so also with us.
      const holder = spawn('unshare', [...unshare, 'sh', '-c', 'echo ready; exec cat'], { stdio: 'pipe' });
      const outcome = await Promise.race([once(holder.stdout, 'data'), ended(holder)]);
      if (Array.isArray(outcome)) return new Namespace(holder, ['nsenter', '--target', String(holder.pid), ...nsenter]);
      reasons.push(`unshare ${unshare.join(' ')}: ${outcome.stderr.trim()}`);
    }
    throw new Error(`these tests need a network namespace, which is not to be had here: ${reasons.join('; ')}`);
  }

  /** Runs a command to its end. */
  async run(...command: string[]): Promise<Outcome> {
    const [program, ...args] = [...this.enter, ...command];
    return ended(spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'] }));
  }

  /** Runs a command that must succeed; returns what it prints. */
  async must(...command: string[]): Promise<string> {
    const { code, stdout, stderr } = await this.run(...command);
    if (code !== 0) throw new Error(`${command.join(' ')} ended with ${code}: ${stderr}`);
    return stdout;
  }

  async close(): Promise<void> {
    const end = once(this.#holder, 'exit');
    this.#holder.stdin?.end();
    await end;
  }
}

/** The end of `child`; one that could not be started ends with -1. */
function ended(child: ChildProcess): Promise<Outcome> {
  let stdout = '';
  let stderr = '';
  child.stdout?.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr?.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  return new Promise((resolve) => {
    child.once('error', (error) => resolve({ code: -1, signal: null, stdout, stderr: stderr + error.message }));
    child.once('close', (code, signal) => resolve({ code, signal, stdout, stderr }));
  });
}

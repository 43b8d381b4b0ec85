/**
 * `ip -statistics -batch -` as a process that stays: to start one for each command costs an emulated machine a hundred milliseconds, which is as
 * much as a whole case of the IPsec matrix. What a command prints is waited for; the ones that print nothing are only known to have worked when a later
 * one has answered, because `ip` ends at the first that does not.
 */
import { type ChildProcessByStdio, spawn } from 'node:child_process';
import type { Readable, Writable } from 'node:stream';

const ANSWER_MS = 120_000;
const ENDED_WELL = 'ended with 0';

export class IpCommand {
  readonly #child: ChildProcessByStdio<Writable, Readable, Readable>;
  #output = '';
  #complaint = '';
  #look = () => {};
  #ended: string | undefined;
  /** Commands that print are asked one after the other. */
  #last: Promise<unknown> = Promise.resolve();

  constructor(command: readonly string[] = ['ip', '-statistics', '-batch', '-']) {
    const [program, ...args] = command;
    this.#child = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'] });
    this.#child.stdout.setEncoding('utf8').on('data', (text: string) => {
      this.#output += text;
      this.#look();
    });
    this.#child.stderr.setEncoding('utf8').on('data', (text: string) => {
      this.#complaint += text;
    });
    // What it could not be told because it has ended: its end says why.
    this.#child.stdin.on('error', () => {});
    this.#child.on('error', (error) => this.#over(error.message));
    this.#child.on('close', (code, signal) => this.#over(`ended with ${code ?? signal}`));
  }

  /** Commands that print nothing. */
  run(commands: readonly string[]): void {
    this.#child.stdin.write(`${commands.join('\n')}\n`);
  }

  /** Commands that print something, until that matches `end`: returns all of it. */
  ask(commands: readonly string[], end: RegExp): Promise<string> {
    const answer = this.#last.then(() => this.#ask(commands, end));
    this.#last = answer.catch(() => {});
    return answer;
  }

  /** Has it end when it has done everything. */
  async stop(): Promise<void> {
    this.#child.stdin.end();
    await new Promise<void>((resolve) => {
      this.#look = () => {
        if (this.#ended !== undefined) resolve();
      };
      this.#look();
    });
    if (this.#ended !== ENDED_WELL) throw new Error(`ip ${this.#ended}: ${this.#complaint.trim()}`);
  }

  #over(how: string): void {
    this.#ended ??= how;
    this.#look();
  }

  #ask(commands: readonly string[], end: RegExp): Promise<string> {
    this.#output = '';
    return new Promise((resolve, reject) => {
      const settle = (act: () => void) => {
        clearTimeout(timer);
        this.#look = () => {};
        act();
      };
      const fail = (why: string) => settle(() => reject(new Error(`ip ${why}: ${this.#complaint.trim()}`)));
      const timer = setTimeout(() => fail(`does not answer '${commands.join('; ')}'`), ANSWER_MS);
      this.#look = () => {
        if (end.test(this.#output)) settle(() => resolve(this.#output));
        else if (this.#ended !== undefined) fail(this.#ended);
      };
      this.run(commands);
      this.#look();
    });
  }
}

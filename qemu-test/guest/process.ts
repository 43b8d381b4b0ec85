/** A child process that answers each request with one message. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';

const START_MS = 120_000;
const ANSWER_MS = 120_000;

export class Helper {
  readonly #child: ChildProcess;
  readonly #name: string;

  private constructor(child: ChildProcess, name: string) {
    this.#child = child;
    this.#name = name;
  }

  /** Starts it, as user `uid` if that is given, and waits for its first message. */
  static async start(name: string, command: readonly string[], uid?: number): Promise<Helper> {
    const [program, ...args] = command;
    const as = uid === undefined ? {} : { uid, gid: uid };
    const child = spawn(program, args, { stdio: ['ignore', 'inherit', 'inherit', 'ipc'], ...as });
    const helper = new Helper(child, name);
    await helper.#answer(START_MS);
    return helper;
  }

  request(request: object): Promise<unknown> {
    if (!this.#child.connected) return Promise.reject(new Error(`${this.#name} has ended`));
    const answer = this.#answer(ANSWER_MS);
    this.#child.send(request, () => {});
    return answer;
  }

  /** Lets go of it, and waits until it has ended. */
  async end(): Promise<void> {
    const over = once(this.#child, 'exit');
    if (this.#child.connected) this.#child.disconnect();
    if (this.#child.exitCode === null && this.#child.signalCode === null) await over;
  }

  #answer(timeoutMs: number): Promise<unknown> {
    return new Promise((resolve, reject) => {
      const settle = (act: () => void) => {
        clearTimeout(timer);
        this.#child.off('exit', over);
        this.#child.off('message', heard);
        act();
      };
      const over = (code: number | null, signal: string | null) =>
        settle(() => reject(new Error(`${this.#name} ended with ${code ?? signal}`)));
      const heard = (message: unknown) => settle(() => resolve(message));
      const timer = setTimeout(
        () => settle(() => reject(new Error(`no answer of ${this.#name} in ${timeoutMs} ms`))),
        timeoutMs,
      );
      this.#child.on('exit', over);
      this.#child.on('message', heard);
    });
  }
}

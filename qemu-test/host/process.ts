/** Child processes that are waited for: their output collected, their failure turned into one readable error. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';

/** A program of the system (apt-get, dpkg-deb, QEMU) failed or is missing. */
export class ToolError extends Error {
  readonly hint: string | undefined;

  constructor(message: string, hint?: string) {
    super(message);
    this.name = 'ToolError';
    this.hint = hint;
  }
}

export interface RunOptions {
  readonly cwd?: string;
  readonly env?: Readonly<Record<string, string>>;
  readonly signal?: AbortSignal | undefined;
  /** How stdout becomes a string; `latin1` keeps every byte. */
  readonly encoding?: 'utf8' | 'latin1';
  /** Called with each line that the program writes to its descriptor 3. */
  readonly onStatus?: (line: string) => void;
}

const STATUS_DESCRIPTOR = 3;
const ERROR_LINES = 12;
const STOP_MS = 3_000;

/** Runs `command` and returns what it wrote to stdout. Throws `ToolError` with the end of its stderr. */
export async function run(command: string, args: readonly string[], options: RunOptions = {}): Promise<string> {
  const child = spawn(command, args, {
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
    ...(options.signal === undefined ? {} : { signal: options.signal }),
    env: { ...process.env, ...options.env },
    stdio: ['ignore', 'pipe', 'pipe', options.onStatus === undefined ? 'ignore' : 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout?.setEncoding(options.encoding ?? 'utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr?.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  const { onStatus } = options;
  if (onStatus !== undefined) {
    const lines = lineSplitter(onStatus);
    child.stdio[STATUS_DESCRIPTOR]?.on('data', (chunk: Buffer) => lines(chunk.toString('utf8')));
  }
  const status = await new Promise<number | string>((resolve, reject) => {
    child.once('error', (error: NodeJS.ErrnoException) => {
      reject(error.code === 'ENOENT' ? new ToolError(`${command} is not installed`) : error);
    });
    child.once('close', (code, signal) => resolve(code ?? signal ?? 'unknown'));
  });
  if (status !== 0) {
    const reason = (stderr.trim() || stdout.trim()).split('\n').slice(-ERROR_LINES).join('\n');
    throw new ToolError(`${command} ${args.at(-1) ?? ''} ended with ${status}:\n${reason}`);
  }
  return stdout;
}

/** Cuts a stream of text into lines; what follows the last newline waits for the next piece. */
export function lineSplitter(onLine: (line: string) => void): (text: string) => void {
  let rest = '';
  return (text) => {
    const lines = (rest + text).split('\n');
    rest = lines.pop() ?? '';
    for (const line of lines) onLine(line);
  };
}

/** Ends a process: politely, then not. */
export async function stop(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null || child.pid === undefined) return;
  const over = once(child, 'exit');
  child.kill('SIGTERM');
  const timer = setTimeout(() => child.kill('SIGKILL'), STOP_MS);
  await over;
  clearTimeout(timer);
}

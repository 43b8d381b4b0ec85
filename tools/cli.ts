/**
 * What every subcommand of `vipsec` shares: exit codes, how errors look, JSON on stdout, the progress line on stderr, clean-up
 * on signals. (Tables are in `table.ts`: not every command has one.)
 *
 * Data goes to stdout, everything else to stderr.
 */
import { writeSync } from 'node:fs';
import { CommanderError } from 'commander';
// Not by `index.ts`: no command needs to load what another is about.
import { InputError, VipsecError } from '../src/errors.ts';

export const ExitCode = {
  done: 0,
  failed: 1,
  /** Wrong usage or an invalid input file. */
  usage: 2,
  /** Finished, but some packets were rejected. */
  rejected: 3,
} as const;

/** Writes `text` and a line feed to stdout. */
export function print(text: string): void {
  process.stdout.write(`${text}\n`);
}

/** Writes a line to stderr. */
export function note(text: string): void {
  process.stderr.write(`${text}\n`);
}

/** `vipsec: warning: …` on stderr. */
export function warn(text: string): void {
  note(`vipsec: warning: ${text}`);
}

/** Prints the one JSON document of `--json`. 64-bit numbers are numbers while they are exact, then strings. */
export function printJson(value: unknown): void {
  const exact = (_key: string, field: unknown): unknown => {
    if (typeof field !== 'bigint') return field;
    return field <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(field) : String(field);
  };
  print(JSON.stringify(value, exact));
}

/** Says what went wrong on stderr and returns the exit code for it. */
export function reportError(thrown: unknown): number {
  const error = firstOf(thrown);
  if (error instanceof CommanderError) return reportUsage(error);
  const message = error instanceof Error ? error.message : String(error);
  note(`vipsec: error: ${oneLine(message)} [${codeOf(error)}]`);
  if (error instanceof VipsecError && error.hint !== undefined) note(`hint: ${oneLine(error.hint)}`);
  const { VIPSEC_DEBUG } = process.env;
  if (VIPSEC_DEBUG === '1' && error instanceof Error) showStack(error);
  return error instanceof InputError ? ExitCode.usage : ExitCode.failed;
}

/** What went wrong first, where clean-up failed as well (`using`). */
function firstOf(error: unknown): unknown {
  return error instanceof Error && error.name === 'SuppressedError' && 'suppressed' in error
    ? firstOf(error.suppressed)
    : error;
}

function showStack(error: Error): void {
  note(error.stack ?? '');
  if (error.cause instanceof Error) {
    note('caused by:');
    showStack(error.cause);
  }
}

/** Help and version are no errors; commander has printed them already. */
function reportUsage(error: CommanderError): number {
  if (error.exitCode === 0) return ExitCode.done;
  if (error.code !== 'commander.help') {
    note(`vipsec: error: ${oneLine(error.message.replace(/^error: /, ''))} [USAGE]`);
    note('hint: see `vipsec --help` or `vipsec COMMAND --help`');
  }
  return ExitCode.usage;
}

function oneLine(text: string): string {
  return text.replaceAll(/\s*\n\s*/g, ' ').trim();
}

/** The stable code of an error; errors of Node have one too (`ENOENT`). */
function codeOf(error: unknown): string {
  if (error instanceof Error && 'code' in error && typeof error.code === 'string') return error.code;
  return 'UNEXPECTED';
}

/** One line on the terminal that is written over and over; nothing when stderr is not a terminal. */
export class ProgressLine {
  readonly #active = process.stderr.isTTY === true;
  #last = 0;
  #shown = false;

  /** Shows the text that `describe` returns, at most ten times a second. */
  update(describe: () => string): void {
    if (!this.#active) return;
    const now = Date.now();
    if (now - this.#last < 100) return;
    this.#last = now;
    this.#shown = true;
    const width = process.stderr.columns ?? 80;
    process.stderr.write(`\r\x1b[K${describe().slice(0, width - 1)}`);
  }

  /** Removes the line. */
  done(): void {
    if (!this.#shown) return;
    this.#shown = false;
    process.stderr.write('\r\x1b[K');
  }

  [Symbol.dispose](): void {
    this.done();
  }
}

const Signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/**
 * Runs `work` with an AbortSignal that a SIGINT, SIGTERM or SIGHUP aborts. `work` cleans up and returns or throws; then the
 * process ends by that signal, as it would have without us. A second signal ends it at once.
 */
export async function untilSignal<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  let received: NodeJS.Signals | undefined;
  const stop = (): void => {
    for (const name of Signals) process.removeListener(name, onSignal);
  };
  const onSignal = (name: NodeJS.Signals): void => {
    received = name;
    stop();
    controller.abort();
  };
  for (const name of Signals) process.on(name, onSignal);
  try {
    return await work(controller.signal);
  } finally {
    stop();
    if (received !== undefined) process.kill(process.pid, received);
  }
}

/** `work`, or nothing when `signal` comes before it is done. */
export function unlessAborted(work: Promise<void>, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const stop = (): void => resolve();
    signal.addEventListener('abort', stop, { once: true });
    work.then(resolve, reject).finally(() => signal.removeEventListener('abort', stop));
  });
}

/** A reader of stdout that goes away (`| head`) is no error: end quietly. */
export function endQuietlyWithoutReader(): void {
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit();
    writeSync(2, `vipsec: error: stdout: ${error.message} [${error.code ?? 'UNEXPECTED'}]\n`);
    process.exit(ExitCode.failed);
  });
}

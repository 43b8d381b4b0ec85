/** Runs the built command line for tests. */
import { type ChildProcess, fork, spawn } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

const program = fileURLToPath(new URL('../../dist/tools/vipsec.js', import.meta.url));
const hostScript = fileURLToPath(new URL('./cli-host.mjs', import.meta.url));

export interface Outcome {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Milliseconds that a command may take. */
const DEADLINE = 25_000;

let host: ChildProcess | null = null;
let asked = 0;

/** The process in which the commands of this test file run. */
function commandHost(): ChildProcess {
  if (host?.connected === true) return host;
  host = fork(hostScript, { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
  host.setMaxListeners(0);
  // It ends with us, and does not keep us.
  host.unref();
  host.channel?.unref();
  return host;
}

/**
 * Runs `vipsec …args` to its end in a process that has run others before: that takes milliseconds, where one of its own takes a third of a
 * second to load. For commands that neither signals nor the ends of pipes concern.
 */
export async function vipsec(
  args: readonly string[],
  options: { env?: Record<string, string>; deadline?: number } = {},
): Promise<Outcome> {
  const child = commandHost();
  const id = ++asked;
  return new Promise((resolve, reject) => {
    const settle = (end: () => void) => {
      clearTimeout(timer);
      child.off('message', onMessage);
      child.off('exit', onExit);
      end();
    };
    const onMessage = (message: { id: number; outcome: Outcome }) => {
      if (message.id === id) settle(() => resolve(message.outcome));
    };
    const onExit = () => settle(() => reject(new Error(`vipsec ${args.join(' ')} ended its process`)));
    const timer = setTimeout(() => child.kill('SIGKILL'), options.deadline ?? DEADLINE);
    child.on('message', onMessage);
    child.once('exit', onExit);
    child.send({ id, args, env: options.env ?? {} });
  });
}

/** Runs `vipsec …args` to its end in a process of its own; kills it after `deadline` milliseconds, which then shows as `signal`. */
export async function vipsecProcess(
  args: readonly string[],
  options: { env?: Record<string, string>; deadline?: number } = {},
): Promise<Outcome> {
  const child = spawn(process.execPath, [program, ...args], {
    env: { ...process.env, ...options.env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const timer = setTimeout(() => child.kill('SIGKILL'), options.deadline ?? DEADLINE);
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  const [code, signal] = await once(child, 'close');
  clearTimeout(timer);
  return { code, signal, stdout, stderr };
}

/** Starts `vipsec …args` and leaves it running. */
export function startVipsec(args: readonly string[], env: Record<string, string> = {}): ChildProcess {
  return spawn(process.execPath, [program, ...args], {
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
}

/** A `vipsec device` on `socket`, which has said that it listens: its socket is there a moment before. */
export async function startDeviceProcess(socket: string, args: readonly string[] = []): Promise<ChildProcess> {
  const child = startVipsec(['device', '--socket', socket, ...args]);
  let ready = false;
  child.stdout?.once('data', () => {
    ready = true;
  });
  for (let i = 0; i < 1000 && !ready; i++) {
    if (child.exitCode !== null) throw new Error(`the device ended with ${child.exitCode}`);
    await sleep(20);
  }
  return child;
}

/** Ends a process and waits for it. */
export async function stop(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const ended = once(child, 'exit');
  child.kill('SIGTERM');
  const timer = setTimeout(() => child.kill('SIGKILL'), 5000);
  await ended;
  clearTimeout(timer);
}

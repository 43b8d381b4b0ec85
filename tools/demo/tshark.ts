/**
 * A second opinion on the wire of the demo: tshark, when it is installed, decrypts the capture with the decryption file and
 * checks every ICV.
 */
import { spawn } from 'node:child_process';
import { copyFileSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/** How long tshark may take. */
const DEADLINE_MS = 60_000;

export interface TsharkVerdict {
  /** ESP packets that it saw. */
  readonly esp: number;
  /** Of these, with a right ICV and an inner IP packet. */
  readonly authentic: number;
  /** Of these, with a wrong ICV. */
  readonly wrong: number;
  /** Frames that are not ESP. */
  readonly clear: number;
}

/**
 * Asks tshark about `capture`. `keys` is the decryption file; `folder` an empty place for its configuration. `null` when tshark is not
 * installed. Throws when it fails.
 */
export async function askTshark(capture: string, keys: string, folder: string): Promise<TsharkVerdict | null> {
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  // Keys in a file and not in arguments, which every user of the machine can read.
  copyFileSync(keys, join(folder, 'esp_sa'));
  writeFileSync(
    join(folder, 'preferences'),
    'esp.enable_encryption_decode: TRUE\nesp.enable_authentication_check: TRUE\nesp.enable_null_encryption_decode_heuristic: FALSE\n',
  );
  const fields = ['esp.spi', 'esp.icv_good', 'frame.protocols'].flatMap((name) => ['-e', name]);
  const args = ['-n', '-r', capture, '-T', 'fields', '-E', 'separator=;', '-E', 'occurrence=a', ...fields];
  const output = await run('tshark', args, { ...process.env, WIRESHARK_CONFIG_DIR: folder });
  return output === null ? null : count(output);
}

function count(output: string): TsharkVerdict {
  let esp = 0;
  let authentic = 0;
  let wrong = 0;
  let clear = 0;
  for (const line of output.split('\n')) {
    if (line === '') continue;
    const [spi, good, protocols = ''] = line.split(';');
    if (spi === '') {
      clear++;
      continue;
    }
    esp++;
    if (good === '1' || good === 'True') authentic += /:esp:ip(v6)?(:|$)/.test(protocols) ? 1 : 0;
    else wrong++;
  }
  return { esp, authentic, wrong, clear };
}

function run(program: string, args: readonly string[], env: NodeJS.ProcessEnv): Promise<string | null> {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { env, stdio: ['ignore', 'pipe', 'pipe'] });
    const timer = setTimeout(() => child.kill('SIGKILL'), DEADLINE_MS);
    let output = '';
    let complaints = '';
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      output += text;
    });
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      complaints += text;
    });
    child.on('error', (error: NodeJS.ErrnoException) => {
      clearTimeout(timer);
      if (error.code === 'ENOENT') resolve(null);
      else reject(error);
    });
    child.on('close', (code, signal) => {
      clearTimeout(timer);
      if (code === 0) resolve(output);
      else reject(new Error(`${program} ended with ${signal ?? code}: ${complaints.trim().slice(0, 500)}`));
    });
  });
}

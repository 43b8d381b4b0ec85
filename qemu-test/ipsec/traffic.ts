/**
 * One end of the applications' traffic, a process in a network namespace: an echo server for UDP and TCP, and a client that
 * checks what comes back. Its parent tells it what to do over the IPC channel.
 */
import { createHash, randomBytes } from 'node:crypto';
import { createSocket } from 'node:dgram';
import { connect } from 'node:net';
import { ECHO_PORT, serveEcho } from './echo.ts';

/** Generous: a guest without its share of a busy machine is slower than any network. */
const WAIT_MS = 60_000;

/** A request to the process, and its answer. */
export type TrafficRequest =
  | { readonly kind: 'udp'; readonly to: string; readonly sizes: readonly number[] }
  | { readonly kind: 'tcp'; readonly to: string; readonly bytes: number };
export type TrafficAnswer = { readonly ok: boolean; readonly detail: string };

/** Sends a datagram of each size and waits for its echo; one that was lost is sent again, one that differs is an error. */
async function udp(to: string, sizes: readonly number[]): Promise<string> {
  const socket = createSocket(to.includes(':') ? 'udp6' : 'udp4');
  try {
    let lost = 0;
    for (const size of sizes) {
      const data = randomBytes(size);
      for (let attempt = 0; ; attempt++) {
        const echo = await new Promise<Buffer | undefined>((resolve) => {
          const timer = setTimeout(() => resolve(undefined), WAIT_MS / 10);
          socket.once('message', (message) => {
            clearTimeout(timer);
            resolve(message);
          });
          socket.send(data, ECHO_PORT, to, (error) => error !== null && resolve(undefined));
        });
        if (echo?.equals(data) === true) break;
        if (echo !== undefined && echo.length === size)
          throw new Error(`a datagram of ${size} bytes came back changed`);
        lost++;
        if (attempt === 4) throw new Error(`no echo of ${size} bytes`);
      }
    }
    return `${sizes.length} datagrams${lost === 0 ? '' : `, ${lost} lost`}`;
  } finally {
    socket.close();
  }
}

/** Sends `bytes` over TCP and compares what comes back. */
function tcp(to: string, bytes: number): Promise<string> {
  const data = randomBytes(bytes);
  const started = performance.now();
  return new Promise((resolve, reject) => {
    const socket = connect({ host: to, port: ECHO_PORT, timeout: WAIT_MS });
    const hash = createHash('sha256');
    let received = 0;
    const fail = (error: Error) => {
      socket.destroy();
      reject(error);
    };
    socket.on('timeout', () => fail(new Error(`TCP stalled after ${received} of ${bytes} bytes`)));
    socket.on('error', fail);
    socket.on('data', (chunk: Buffer) => {
      hash.update(chunk);
      received += chunk.length;
    });
    socket.on('end', () => {
      const same = received === bytes && hash.digest('hex') === createHash('sha256').update(data).digest('hex');
      if (!same) fail(new Error(`TCP gave back ${received} of ${bytes} bytes, or others`));
      else resolve(`${bytes / 1024} KiB and back in ${Math.round(performance.now() - started)} ms`);
    });
    socket.on('connect', () => socket.end(data));
  });
}

function serveRequest(request: TrafficRequest): Promise<string> {
  return request.kind === 'udp' ? udp(request.to, request.sizes) : tcp(request.to, request.bytes);
}

function isRequest(message: unknown): message is TrafficRequest {
  return typeof message === 'object' && message !== null && 'kind' in message && 'to' in message;
}

process.on('message', async (message) => {
  if (!isRequest(message)) return;
  let answer: TrafficAnswer;
  try {
    answer = { ok: true, detail: await serveRequest(message) };
  } catch (error) {
    answer = { ok: false, detail: error instanceof Error ? error.message : String(error) };
  }
  process.send?.(answer);
});
process.on('disconnect', () => process.exit());
serveEcho();
process.send?.({ ok: true, detail: 'ready' });

/** QEMU's control channel (QMP): one JSON document per line. Used to unplug a device or take a link down. */
import { createServer, type Server, type Socket } from 'node:net';
import { lineSplitter } from './process.ts';

const TIMEOUT_MS = 10_000;

export class Qmp {
  readonly #server: Server;
  readonly #ready: Promise<Socket>;
  readonly #replies: ((reply: Record<string, unknown>) => void)[] = [];

  private constructor(server: Server, ready: Promise<Socket>) {
    this.#server = server;
    this.#ready = ready;
  }

  /** Waits at `path` for QEMU to connect. */
  static async listen(path: string): Promise<Qmp> {
    const server = createServer();
    let greeted: (socket: Socket) => void = () => {};
    const ready = new Promise<Socket>((resolve) => {
      greeted = resolve;
    });
    const qmp = new Qmp(server, ready);
    server.on('connection', (socket) => {
      const lines = lineSplitter((line) => {
        const message: unknown = JSON.parse(line);
        if (typeof message !== 'object' || message === null) return;
        if ('QMP' in message) {
          socket.write('{"execute":"qmp_capabilities"}\n');
          qmp.#replies.push(() => greeted(socket));
        } else if ('return' in message || 'error' in message) {
          qmp.#replies.shift()?.({ ...message });
        }
      });
      socket.setEncoding('utf8').on('data', (text) => lines(String(text)));
      socket.on('error', () => socket.destroy());
    });
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen(path, resolve);
    });
    return qmp;
  }

  async execute(command: string, args: Readonly<Record<string, unknown>>): Promise<unknown> {
    const socket = await this.#ready;
    const reply = await new Promise<Record<string, unknown>>((resolve, reject) => {
      const timer = setTimeout(() => reject(new Error(`QEMU does not answer ${command}`)), TIMEOUT_MS);
      this.#replies.push((message) => {
        clearTimeout(timer);
        resolve(message);
      });
      socket.write(`${JSON.stringify({ execute: command, arguments: args })}\n`);
    });
    const { error, return: result } = reply;
    if (error !== undefined) throw new Error(`QEMU refuses ${command}: ${JSON.stringify(error)}`);
    return result;
  }

  close(): void {
    this.#server.close();
  }
}

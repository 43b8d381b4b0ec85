/** The line to the guest: its second serial port, which QEMU connects to a socket of ours. */
import { once } from 'node:events';
import { createServer, type Server, type Socket } from 'node:net';
import { type GuestMessage, type HostMessage, parseGuestMessage } from '../messages.ts';
import { lineSplitter } from './process.ts';

const SHOWN = 200;

export class GuestLine {
  readonly #server: Server;
  #guest: Socket | undefined;

  private constructor(onMessage: (message: GuestMessage) => void, onRubbish: (text: string) => void) {
    this.#server = createServer((socket) => {
      this.#guest = socket;
      const split = lineSplitter((line) => {
        const message = parseGuestMessage(line);
        if (message === undefined) onRubbish(line.slice(0, SHOWN));
        else onMessage(message);
      });
      socket.setEncoding('utf8').on('data', (text) => split(String(text)));
      socket.on('error', () => socket.destroy());
    });
  }

  static async listen(
    path: string,
    onMessage: (message: GuestMessage) => void,
    onRubbish: (text: string) => void,
  ): Promise<GuestLine> {
    const line = new GuestLine(onMessage, onRubbish);
    line.#server.listen(path);
    await once(line.#server, 'listening');
    return line;
  }

  send(message: HostMessage): void {
    this.#guest?.write(`${JSON.stringify(message)}\n`);
  }

  close(): void {
    this.#guest?.destroy();
    this.#server.close();
  }
}

/**
 * vfio-user messages over a Unix socket: framing, descriptors, limits. Client and server use it alike; which messages
 * make sense when is theirs to know.
 */
import { constants as os } from 'node:os';
import { SystemError, VfioError } from '../errors.ts';
import { close } from '../sys/libc.ts';
import { readU16, readU32, writeU16 } from '../sys/little-endian.ts';
import { CLOSED_ERRORS, type UnixSocket } from '../sys/unix-socket.ts';
import { Header, HeaderFlag, MAX_MESSAGE_SIZE, protocolError } from './protocol.ts';

/** One received message. Whoever gets it owns its descriptors and closes them, or calls `dropDescriptors`. */
export interface ReceivedMessage {
  readonly id: number;
  readonly command: number;
  /** `HeaderFlag`. */
  readonly flags: number;
  /** errno of a reply with the error flag. */
  readonly error: number;
  readonly payload: Uint8Array;
  readonly descriptors: number[];
}

export function isReply(message: ReceivedMessage): boolean {
  return (message.flags & HeaderFlag.typeMask) === HeaderFlag.reply;
}

/** Closes the descriptors that came with a message. */
export function dropDescriptors(message: ReceivedMessage): void {
  for (const fd of message.descriptors.splice(0)) close(fd);
}

/**
 * Every method may throw VfioError: `PEER_CLOSED` when the other side is gone, `PROTOCOL` when it sent what is no
 * message,
 * `TIMEOUT` when a deadline (of `performance.now()`) passed. After any of these the stream is out of step: close it.
 */
export class MessageSocket {
  readonly socket: UnixSocket;
  readonly #maxDescriptors: number;
  readonly #maxSize: number;
  /** The message that is arriving: how much of header and payload is there, and its descriptors so far. */
  readonly #header = new Uint8Array(Header.length);
  #payload: Uint8Array | null = null;
  #received = 0;
  #descriptors: number[] = [];

  /** Owns `socket`. Takes `maxDescriptors` in one message, and messages of up to `maxSize` bytes. */
  constructor(socket: UnixSocket, maxDescriptors: number, maxSize: number = MAX_MESSAGE_SIZE) {
    this.socket = socket;
    this.#maxDescriptors = maxDescriptors;
    this.#maxSize = maxSize;
  }

  get fd(): number {
    return this.socket.fd;
  }

  /** Sends `message` under `id`. */
  send(message: Uint8Array, id: number, deadline: number, descriptors: readonly number[] = []): void {
    writeU16(message, Header.id, id);
    try {
      this.socket.send(message, deadline, descriptors);
    } catch (error) {
      throw translate(error);
    }
  }

  /**
   * Sends `message` under `id` from byte `start` on, as far as the other side takes it now, and never waits; returns how many bytes that was. The
   * descriptors go with the first of them.
   */
  trySend(message: Uint8Array, id: number, start: number, descriptors: readonly number[] = []): number {
    if (start === 0) writeU16(message, Header.id, id);
    try {
      return Math.max(0, this.socket.trySend(message, start, start === 0 ? descriptors : []));
    } catch (error) {
      throw translate(error);
    }
  }

  /** The next message, however much of it is there already. */
  receive(deadline: number): ReceivedMessage {
    for (;;) {
      const message = this.tryReceive();
      if (message !== null) return message;
      try {
        this.socket.waitReadable(deadline);
      } catch (error) {
        throw translate(error);
      }
    }
  }

  /** The next message if all of it is there; null when more has to come. Never waits. */
  tryReceive(): ReceivedMessage | null {
    try {
      if (this.#payload === null) {
        if (!this.#fill(this.#header)) return null;
        this.#payload = new Uint8Array(this.#payloadLength());
        this.#received = 0;
      }
      if (!this.#fill(this.#payload)) return null;
      return this.#take(this.#payload);
    } catch (error) {
      this.#dropPending();
      throw translate(error);
    }
  }

  /** Closes the socket and the descriptors of a message that had not yet arrived in full. Idempotent. */
  close(): void {
    this.#dropPending();
    this.socket.close();
  }

  /** Receives until `part` is full; false when the socket has no more for now. */
  #fill(part: Uint8Array): boolean {
    while (this.#received < part.length) {
      const left = part.length - this.#received;
      const count = this.socket.tryReceive(part, this.#received, left, this.#descriptors, this.#maxDescriptors);
      if (count < 0) return false;
      if (count === 0) throw new VfioError('PEER_CLOSED', 'vfio-user: the other side closed the socket');
      this.#received += count;
    }
    return true;
  }

  #payloadLength(): number {
    const size = readU32(this.#header, Header.size);
    if (size < Header.length || size > this.#maxSize) throw protocolError(`message of ${size} bytes`);
    return size - Header.length;
  }

  #take(payload: Uint8Array): ReceivedMessage {
    const message = {
      id: readU16(this.#header, Header.id),
      command: readU16(this.#header, Header.command),
      flags: readU32(this.#header, Header.flags),
      error: readU32(this.#header, Header.error),
      payload,
      descriptors: this.#descriptors,
    };
    this.#payload = null;
    this.#received = 0;
    this.#descriptors = [];
    return message;
  }

  #dropPending(): void {
    for (const fd of this.#descriptors.splice(0)) close(fd);
  }
}

function translate(error: unknown): unknown {
  if (!(error instanceof SystemError)) return error;
  if (CLOSED_ERRORS.includes(error.errno)) {
    return new VfioError('PEER_CLOSED', 'vfio-user: the other side closed the socket', { cause: error });
  }
  if (error.errno === os.errno.ETIMEDOUT) {
    return new VfioError('TIMEOUT', 'vfio-user: the other side did not take or send a message in time', {
      cause: error,
    });
  }
  if (error.errno === os.errno.EMSGSIZE) return protocolError('too many descriptors in a message', error);
  return error;
}

/**
 * A vhost-user session, front-end side: requests and replies over one Unix socket (QEMU's docs/interop/vhost-user.rst,
 * "Communication").
 *
 * A request that has a reply, or for which one can be asked (REPLY_ACK), blocks until the reply is there or its deadline has
 * passed. The back-end says nothing by itself on this socket: whatever comes without having been asked for, a reply that is
 * not the one that is due, and a missed deadline end the session (`vfio/session.ts`).
 */
import { constants as os } from 'node:os';
import { SystemError, VfioError } from '../errors.ts';
import { readU32, writeU32 } from '../sys/little-endian.ts';
import { CLOSED_ERRORS, type UnixSocket } from '../sys/unix-socket.ts';
import { SocketSession } from '../vfio/session.ts';
import {
  encodeEmpty,
  Header,
  HeaderFlag,
  Payload,
  protocolError,
  Request,
  requestName,
} from './vhost-user-protocol.ts';

export class VhostUserSession extends SocketSession {
  /** Set once REPLY_ACK is negotiated: from then on every request is answered. */
  acknowledged = false;
  readonly #socket: UnixSocket;

  /** Owns `socket`. `timeoutMs` is the deadline of every call. */
  constructor(socket: UnixSocket, timeoutMs: number) {
    super(socket, timeoutMs, 'port');
    this.#socket = socket;
  }

  /** Sends a request that has a reply, and returns the payload of that: `min` to `max` bytes. */
  ask(message: Uint8Array, min: number, max = min): Uint8Array {
    return this.#exchange(message, [], (deadline) =>
      this.#receive(readU32(message, Header.request), min, max, deadline),
    );
  }

  /** Like `ask`, and has `decode` end the session when it throws because of what the reply says. */
  askFor<T>(message: Uint8Array, decode: (payload: Uint8Array) => T, min: number = Payload.u64, max = min): T {
    return this.#exchange(message, [], (deadline) =>
      decode(this.#receive(readU32(message, Header.request), min, max, deadline)),
    );
  }

  /**
   * Sends a request that has no reply of its own. With REPLY_ACK it waits for the acknowledgement and throws
   * `DEVICE_REFUSED` when the back-end says that the request failed; the session goes on then.
   */
  tell(message: Uint8Array, descriptors: readonly number[] = []): void {
    if (!this.acknowledged) {
      this.#exchange(message, descriptors, () => {});
      return;
    }
    const request = readU32(message, Header.request);
    writeU32(message, Header.flags, HeaderFlag.version | HeaderFlag.needReply);
    this.#exchange(message, descriptors, (deadline) => {
      const payload = this.#receive(request, Payload.u64, Payload.u64, deadline);
      if (payload.some((byte) => byte !== 0)) {
        throw new VfioError('DEVICE_REFUSED', `the back-end refused ${requestName(request)}`);
      }
    });
  }

  /** Returns when the back-end has done all that it was told before. One that refused something may have closed the socket. */
  settle(): void {
    if (!this.acknowledged) this.ask(encodeEmpty(Request.GET_FEATURES), Payload.u64);
  }

  /** Sends, then has `finish` wait for what has to come back. */
  #exchange<T>(message: Uint8Array, descriptors: readonly number[], finish: (deadline: number) => T): T {
    this.check();
    const deadline = this.deadline();
    return this.guard(() => {
      this.#socket.send(message, deadline, descriptors);
      return finish(deadline);
    });
  }

  /** The payload of the reply to `request`. Descriptors never come with one. */
  #receive(request: number, min: number, max: number, deadline: number): Uint8Array {
    const header = new Uint8Array(Header.length);
    this.#socket.receive(header, 0, Header.length, deadline);
    const flags = readU32(header, Header.flags);
    const answered = readU32(header, Header.request);
    if (answered !== request) {
      throw protocolError(`a reply to ${requestName(answered)} instead of ${requestName(request)}`);
    }
    // A back-end may leave the flag standing that asked for the reply.
    if ((flags & ~HeaderFlag.needReply) !== (HeaderFlag.version | HeaderFlag.reply)) {
      throw protocolError(`a reply to ${requestName(request)} with flags ${flags}`);
    }
    const size = readU32(header, Header.size);
    if (size < min || size > max) throw protocolError(`a reply to ${requestName(request)} of ${size} bytes`);
    const payload = new Uint8Array(size);
    this.#socket.receive(payload, 0, size, deadline);
    return payload;
  }

  /** Something came while nobody waited: the end of the stream, or what must not be. */
  protected override serveIdle(): void {
    const count = this.#socket.tryReceive(new Uint8Array(1), 0, 1);
    if (count === 0) throw closed();
    if (count > 0) throw protocolError('a message came to no request');
  }

  protected override translate(error: unknown): VfioError {
    return translate(error);
  }
}

function closed(cause?: unknown): VfioError {
  return new VfioError('DEVICE_GONE', 'the back-end closed its socket', cause === undefined ? {} : { cause });
}

function translate(error: unknown): VfioError {
  if (error instanceof VfioError) return error;
  if (!(error instanceof SystemError)) return protocolError('a reply that cannot be read', error);
  if (CLOSED_ERRORS.includes(error.errno)) return closed(error);
  if (error.errno === os.errno.ETIMEDOUT) {
    return new VfioError('TIMEOUT', 'vhost-user: the back-end did not take or answer a message in time', {
      cause: error,
    });
  }
  if (error.errno === os.errno.EMSGSIZE) return protocolError('descriptors came with a reply', error);
  return new VfioError('DEVICE_GONE', 'the socket of the back-end failed', { cause: error });
}

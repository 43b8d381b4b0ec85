/**
 * A vfio-user session, client side: requests and their replies over one socket, and the requests of the server in
 * between.
 *
 * A request blocks until its reply is there or its deadline has passed. Meanwhile, and whenever the event loop finds
 * the socket readable, DMA_READ and DMA_WRITE of the server are served. How a session ends is in `session.ts`.
 */
import { constants as os } from 'node:os';
import { VfioError } from '../errors.ts';
import { errnoName } from '../sys/libc.ts';
import { dropDescriptors, isReply, type MessageSocket, type ReceivedMessage } from './message-socket.ts';
import * as protocol from './protocol.ts';
import { SocketSession } from './session.ts';

/** Memory that the server may reach: where `count` bytes at `iova` are, or null when they are not (all) mapped. */
export type DmaLookup = (iova: number, count: number) => { memory: { u8: Uint8Array }; offset: number } | null;

/** Messages served in one turn of the event loop, so that a talkative server leaves time for others. */
const SERVED_PER_TURN = 64;

export class UserSession extends SocketSession {
  readonly #socket: MessageSocket;
  #lookup: DmaLookup = () => null;
  #nextId = 1;

  /** Owns `socket`, on which the version is agreed already. `timeoutMs` is the deadline of every call. */
  constructor(socket: MessageSocket, timeoutMs: number) {
    super(socket, timeoutMs, 'function');
    this.#socket = socket;
  }

  /** Says which memory DMA_READ and DMA_WRITE reach. */
  serveDma(lookup: DmaLookup): void {
    this.#lookup = lookup;
  }

  /**
   * Sends a request and returns the payload of its reply, with `expected` descriptors at most (they are appended to
   * `received`). Throws
   * `DEVICE_REFUSED` when the reply says that the request failed; the session goes on then.
   */
  request(message: Uint8Array, descriptors: readonly number[] = [], received: number[] = [], expected = 0): Uint8Array {
    this.check();
    const deadline = this.deadline();
    const id = this.#takeId();
    return this.guard(() => {
      this.#socket.send(message, id, deadline, descriptors);
      for (;;) {
        const answer = this.#socket.receive(deadline);
        if (!isReply(answer)) {
          this.#serve(answer, deadline);
          // A server that asks without end would keep the socket readable past the deadline.
          if (performance.now() < deadline) continue;
          throw new VfioError('TIMEOUT', 'vfio-user: the server asked on and on but did not reply');
        }
        return takeReply(answer, id, message, received, expected);
      }
    });
  }

  /** Sends a request to which no reply is wanted (`HeaderFlag.noReply` is set in it). */
  post(message: Uint8Array): void {
    this.check();
    this.guard(() => this.#socket.send(message, this.#takeId(), this.deadline()));
  }

  #takeId(): number {
    const id = this.#nextId;
    this.#nextId = (id + 1) & 0xffff;
    return id;
  }

  protected override translate(error: unknown): VfioError {
    if (!(error instanceof VfioError)) {
      return new VfioError('DEVICE_GONE', 'the socket of the device failed', { cause: error });
    }
    if (error.code !== 'PEER_CLOSED') return error;
    return new VfioError('DEVICE_GONE', 'the device process closed its socket', { cause: error });
  }

  /** Serves what has come while nobody was waiting for a reply. */
  protected override serveIdle(): void {
    for (let i = 0; i < SERVED_PER_TURN; i++) {
      const message = this.#socket.tryReceive();
      if (message === null) return;
      if (isReply(message)) {
        dropDescriptors(message);
        throw protocol.protocolError('a reply came to no request');
      }
      this.#serve(message, this.deadline());
    }
  }

  /** Serves one request of the server. */
  #serve(message: ReceivedMessage, deadline: number): void {
    const { id, command, flags, payload } = message;
    dropDescriptors(message);
    if ((flags & protocol.HeaderFlag.typeMask) !== protocol.HeaderFlag.request) {
      throw protocol.protocolError(`message of type ${flags & protocol.HeaderFlag.typeMask}`);
    }
    const answer = this.#execute(command, payload);
    if ((flags & protocol.HeaderFlag.noReply) !== 0) return;
    const bytes =
      typeof answer === 'number' ? protocol.errorReply(id, command, answer) : protocol.reply(id, command, answer);
    this.#socket.send(bytes, id, deadline);
  }

  /** Does what the server asks; returns the payload of the reply, or an errno. */
  #execute(command: number, payload: Uint8Array): Uint8Array | number {
    const isWrite = command === protocol.Command.dmaWrite;
    if (!isWrite && command !== protocol.Command.dmaRead) return os.errno.ENOTSUP;
    const { address, count, data } = protocol.decodeDmaAccess(payload, isWrite);
    if (count > protocol.DEFAULT_CAPABILITIES.maxDataTransfer) return os.errno.EINVAL;
    const place = this.#lookup(address, count);
    if (place === null) return os.errno.EFAULT;
    const { memory, offset } = place;
    if (!isWrite) return protocol.encodeDmaReply(address, count, memory.u8.subarray(offset, offset + count));
    memory.u8.set(data, offset);
    return protocol.encodeDmaReply(address, count);
  }
}

/** Checks that `answer` is the reply to request `id`, and takes it apart. */
function takeReply(
  answer: ReceivedMessage,
  id: number,
  request: Uint8Array,
  received: number[],
  expected: number,
): Uint8Array {
  const command = protocol.commandOf(request);
  if (answer.id !== id || answer.command !== command) {
    dropDescriptors(answer);
    throw protocol.protocolError(`reply ${answer.id} to command ${answer.command}, not ${id} to ${command}`);
  }
  if (answer.descriptors.length > expected) {
    dropDescriptors(answer);
    throw protocol.protocolError(`unexpected descriptors in the reply to command ${command}`);
  }
  if ((answer.flags & protocol.HeaderFlag.error) !== 0) {
    dropDescriptors(answer);
    const reason = answer.error === 0 ? 'no reason given' : errnoName(answer.error);
    throw new VfioError('DEVICE_REFUSED', `the device refused ${protocol.commandName(command)}: ${reason}`);
  }
  received.push(...answer.descriptors);
  return answer.payload;
}

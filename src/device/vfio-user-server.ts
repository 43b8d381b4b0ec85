/**
 * The vfio-user server: one function behind one socket, for one client at a time (protocol: `vfio/protocol.ts`).
 *
 * Unlike the protocol's text, every session begins with a function that has been reset: what a client leaves behind,
 * it leaves to nobody. A message that is no message ends the session; a request that cannot be done gets an error
 * reply. A client that has connected and does not say which version it speaks is turned out after a while, as others
 * may wait. Nor is anybody waited for who does not take his replies: until then nothing more is done for him.
 */
import { constants as os } from 'node:os';
import { SystemError, VfioError } from '../errors.ts';
import { ffi, type Watch } from '../sys/ffi/ffi.ts';
import { readU32, writeU32 } from '../sys/little-endian.ts';
import { UnixListener, type UnixSocket } from '../sys/unix-socket.ts';
import { dropDescriptors, isReply, MessageSocket, type ReceivedMessage } from '../vfio/message-socket.ts';
import * as protocol from '../vfio/protocol.ts';
import { DeviceError } from './errors.ts';
import type { VirtioFunction } from './function.ts';
import { MAX_WINDOWS } from './guest-memory.ts';
import { NotificationEventFds } from './notification-eventfds.ts';
import { CONFIG_SPACE_SIZE, Command as PciCommand } from './pci.ts';

const { Command, HeaderFlag } = protocol;

/** Descriptors in one message: as many as there are vectors, at least. */
/** QEMU refuses a server that announces more than 16. */
const MAX_MESSAGE_DESCRIPTORS = 16;
const MAX_DATA_TRANSFER = 1048576;
const PAGE_SIZES = 4096;
/** Milliseconds until a client must have sent VERSION, and until it must take a reply; and between looks whether it does. */
const HANDSHAKE_TIMEOUT = 5000;
const REPLY_TIMEOUT = 2000;
const REPLY_PACE = 1;
/** Messages in a row before others get their turn. */
const MESSAGES_PER_TURN = 64;

/**
 * Regions and interrupt types of a PCI device (linux/vfio.h): BARs, ROM, configuration space, VGA; INTx, MSI, MSI-X,
 * error, request.
 */
const REGIONS = 9;
const IRQS = 5;
const CONFIG_REGION = 7;

/** Replies that carry an errno of their own. */
class Refusal extends Error {
  readonly errno: number;

  constructor(errno: number) {
    super(`errno ${errno}`);
    this.errno = errno;
  }
}

export interface ServerOptions {
  readonly path: string;
  readonly fn: VirtioFunction;
  /** Told of a session's end: why, or null when the client just left. */
  readonly onSessionEnd?: (reason: string | null) => void;
}

export class VfioUserServer {
  /** Sessions so far, and messages that got an error reply. */
  sessions = 0;
  errorReplies = 0;
  readonly #options: ServerOptions;
  readonly #listener: UnixListener;
  #accepting: Pick<Watch, 'close'> | null = null;
  #session: Session | null = null;
  #closed = false;

  /** Listens. Throws DeviceError `SOCKET_IN_USE`, `SOCKET_NOT_A_SOCKET`, or SystemError. */
  constructor(options: ServerOptions) {
    this.#options = options;
    this.#listener = listen(options.path);
    this.#watch();
  }

  get hasClient(): boolean {
    return this.#session !== null;
  }

  /** Ends the session, stops listening, removes the socket. Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#accepting?.close();
    this.#accepting = null;
    this.#session?.close(null);
    this.#listener.close();
  }

  #watch(): void {
    this.#accepting = this.#listener.watch((socket) => this.#begin(socket));
  }

  #begin(socket: UnixSocket): void {
    // The next client waits in the backlog until this one has left.
    this.#accepting?.close();
    this.#accepting = null;
    this.sessions++;
    this.#session = new Session(socket, this.#options.fn, {
      refused: () => {
        this.errorReplies++;
      },
      ended: (reason) => {
        this.#session = null;
        this.#options.onSessionEnd?.(reason);
        if (!this.#closed) this.#watch();
      },
    });
  }
}

/** Listens on `path`, mode 0600; a socket that a dead process left is replaced. */
export function listen(path: string): UnixListener {
  try {
    return UnixListener.listen(path, { mode: 0o600 });
  } catch (error) {
    if (!(error instanceof SystemError) || error.errno !== os.errno.EADDRINUSE) throw error;
    throw new DeviceError('SOCKET_IN_USE', `${path} is in use, or is not a socket`, {
      hint: 'stop the process that listens there, or choose another path',
    });
  }
}

interface SessionEvents {
  refused(): void;
  ended(reason: string | null): void;
}

/** A reply that the client has not taken as a whole. */
interface Reply {
  readonly message: Uint8Array;
  readonly id: number;
  readonly descriptors: readonly number[];
  readonly deadline: number;
  sent: number;
}

/** One client. */
class Session {
  readonly #fn: VirtioFunction;
  readonly #events: SessionEvents;
  readonly #messages: MessageSocket;
  /** Null while a reply is to be taken. */
  #watch: Watch | null = null;
  #reply: Reply | null = null;
  #replyTimer: NodeJS.Timeout | null = null;
  readonly #deadline: NodeJS.Timeout;
  readonly #notifications: NotificationEventFds;
  /** Descriptors that the client takes in one message, and those that go with the next reply. */
  #maxDescriptors = 0;
  #attached: readonly number[] = [];
  #agreed = false;
  #open = true;

  constructor(socket: UnixSocket, fn: VirtioFunction, events: SessionEvents) {
    this.#fn = fn;
    this.#events = events;
    this.#messages = new MessageSocket(socket, MAX_MESSAGE_DESCRIPTORS);
    this.#notifications = new NotificationEventFds(fn);
    fn.reset();
    this.#listen();
    this.#deadline = setTimeout(() => {
      if (!this.#agreed) this.close('no VERSION in time');
    }, HANDSHAKE_TIMEOUT);
    this.#deadline.unref();
  }

  close(reason: string | null): void {
    if (!this.#open) return;
    this.#open = false;
    clearTimeout(this.#deadline);
    if (this.#replyTimer !== null) clearTimeout(this.#replyTimer);
    this.#watch?.close();
    this.#messages.close();
    this.#notifications.close();
    this.#fn.msix.disconnectAll();
    this.#fn.reset();
    this.#fn.memory.clear();
    this.#events.ended(reason);
  }

  #listen(): void {
    this.#watch = ffi().watch(this.#messages.fd, () => this.#guard(() => this.#serve()));
  }

  #guard(work: () => void): void {
    try {
      work();
    } catch (error) {
      const gone = error instanceof VfioError && error.code === 'PEER_CLOSED';
      this.close(gone ? null : error instanceof Error ? error.message : String(error));
    }
  }

  #serve(): void {
    for (let i = 0; i < MESSAGES_PER_TURN && this.#open && this.#reply === null; i++) {
      const message = this.#messages.tryReceive();
      if (message === null) return;
      this.#answer(message);
    }
  }

  #send(message: Uint8Array, id: number, descriptors: readonly number[] = []): void {
    this.#reply = { message, id, descriptors, deadline: performance.now() + REPLY_TIMEOUT, sent: 0 };
    this.#flush();
  }

  /** Sends what the client takes of the reply, and looks again after a moment when that is not all of it. */
  #flush(): void {
    const reply = this.#reply;
    if (reply === null) return;
    const { message, id, descriptors, deadline } = reply;
    while (reply.sent < message.length) {
      const sent = this.#messages.trySend(message, id, reply.sent, descriptors);
      reply.sent += sent;
      if (sent > 0) continue;
      if (performance.now() >= deadline) throw protocol.protocolError('the client does not take its replies');
      // Requests that wait would wake who listens again and again.
      this.#watch?.close();
      this.#watch = null;
      this.#replyTimer = setTimeout(() => this.#guard(() => this.#flush()), REPLY_PACE);
      return;
    }
    this.#reply = null;
    if (this.#watch === null) this.#listen();
  }

  #answer(message: ReceivedMessage): void {
    const { id, command, flags } = message;
    const silent = (flags & HeaderFlag.noReply) !== 0;
    try {
      if (isReply(message)) throw protocol.protocolError('a reply to nothing');
      if (!this.#agreed && command !== Command.version) throw protocol.protocolError('a request before VERSION');
      this.#attached = [];
      const payload = this.#handle(message);
      if (!silent) this.#send(protocol.reply(id, command, payload), id, this.#attached);
    } catch (error) {
      const errno = errnoOf(error);
      if (errno === null) throw error;
      this.#events.refused();
      if (!silent) this.#send(protocol.errorReply(id, command, errno), id);
      // Without an agreed version there is no session.
      if (!this.#agreed) throw protocol.protocolError('no common version');
    } finally {
      dropDescriptors(message);
    }
  }

  /**
   * Carries a request out; returns the payload of its reply. Descriptors that it takes, it removes from the message.
   */
  #handle(message: ReceivedMessage): Uint8Array {
    const { command, payload } = message;
    switch (command) {
      case Command.version:
        return this.#version(payload);
      case Command.dmaMap:
        return this.#dmaMap(message);
      case Command.dmaUnmap:
        return this.#dmaUnmap(payload);
      case Command.deviceGetInfo:
        return protocol.encodeDeviceInfo({
          flags: protocol.DeviceFlag.reset | protocol.DeviceFlag.pci,
          regions: REGIONS,
          irqs: IRQS,
        });
      case Command.deviceGetRegionInfo:
        return this.#regionInfo(payload);
      case Command.deviceGetRegionIoFds:
        return this.#regionIoFds(payload);
      case Command.deviceGetIrqInfo:
        return this.#irqInfo(payload);
      case Command.deviceSetIrqs:
        return this.#setIrqs(message);
      case Command.regionRead:
        return this.#regionRead(payload);
      case Command.regionWrite:
        return this.#regionWrite(payload);
      case Command.deviceReset:
        this.#fn.reset();
        return NOTHING;
      default:
        throw new Refusal(os.errno.ENOSYS);
    }
  }

  #version(payload: Uint8Array): Uint8Array {
    const { major, capabilities } = protocol.decodeVersion(payload);
    this.#maxDescriptors = Math.min(capabilities.maxMessageDescriptors, MAX_MESSAGE_DESCRIPTORS);
    if (major !== protocol.PROTOCOL_MAJOR || this.#agreed) throw new Refusal(os.errno.EINVAL);
    this.#agreed = true;
    const version = { major: protocol.PROTOCOL_MAJOR, minor: protocol.PROTOCOL_MINOR };
    const full = protocol.encodeVersion({
      ...version,
      capabilities: {
        maxMessageDescriptors: MAX_MESSAGE_DESCRIPTORS,
        maxDataTransfer: MAX_DATA_TRANSFER,
        maxDmaMaps: MAX_WINDOWS,
        pageSizes: PAGE_SIZES,
      },
    });
    // QEMU takes no reply that is longer than its request; without capabilities the defaults hold, which are ours too
    // but for the descriptors.
    return full.length <= payload.length ? full : full.slice(0, protocol.Version.fixed);
  }

  #dmaMap(message: ReceivedMessage): Uint8Array {
    const { flags, offset, address, size } = protocol.decodeDmaMap(message.payload);
    if (message.descriptors.length > 1) throw new Refusal(os.errno.EINVAL);
    const fd = message.descriptors.pop();
    // Memory without a descriptor can only be reached by message: not by this device.
    if (fd === undefined) return NOTHING;
    this.#fn.memory.map(address, size, fd, offset, (flags & protocol.DmaMapFlag.writeable) !== 0);
    return NOTHING;
  }

  #dmaUnmap(payload: Uint8Array): Uint8Array {
    const { flags, address, size } = protocol.decodeDmaUnmap(payload);
    if ((flags & ~protocol.DmaUnmapFlag.all) !== 0) throw new Refusal(os.errno.EINVAL);
    if ((flags & protocol.DmaUnmapFlag.all) !== 0) this.#fn.memory.unmap(0, Number.MAX_VALUE);
    else this.#fn.memory.unmap(address, size);
    return payload.slice(0, protocol.DmaUnmap.length);
  }

  #regionInfo(payload: Uint8Array): Uint8Array {
    const { argsz, index } = protocol.decodeInfoRequest('DEVICE_GET_REGION_INFO', payload);
    if (index >= REGIONS) throw new Refusal(os.errno.EINVAL);
    const size = this.#regionSize(index);
    const flags = size === 0 ? 0 : protocol.RegionFlag.read | protocol.RegionFlag.write;
    return protocol.encodeRegionInfo({ index, flags, size, offset: 0, areas: null }, argsz);
  }

  /** Notification registers have eventfds, so that any thread of the driver can notify, without waiting for an answer. */
  #regionIoFds(payload: Uint8Array): Uint8Array {
    const { argsz, index } = protocol.decodeInfoRequest('DEVICE_GET_REGION_IO_FDS', payload);
    if (index >= REGIONS) throw new Refusal(os.errno.EINVAL);
    const { areas, descriptors } = this.#notifications.describe(index, this.#maxDescriptors);
    const reply = protocol.encodeIoFds({ index, areas }, argsz);
    if (areas.length > 0 && reply.length > protocol.RegionIoFds.length) this.#attached = descriptors;
    return reply;
  }

  #regionSize(index: number): number {
    if (index === CONFIG_REGION) return CONFIG_SPACE_SIZE;
    return this.#fn.config.layout.bars[index]?.size ?? 0;
  }

  #irqInfo(payload: Uint8Array): Uint8Array {
    const { index } = protocol.decodeInfoRequest('DEVICE_GET_IRQ_INFO', payload);
    if (index >= IRQS) throw new Refusal(os.errno.EINVAL);
    if (index !== protocol.PciIrq.msix) return protocol.encodeIrqInfo({ index, flags: 0, count: 0 });
    const flags = protocol.IrqFlag.eventfd | protocol.IrqFlag.noResize;
    return protocol.encodeIrqInfo({ index, flags, count: this.#fn.msix.vectors });
  }

  #setIrqs(message: ReceivedMessage): Uint8Array {
    const { flags, index, start, count, data } = protocol.decodeSetIrqs(message.payload);
    const F = protocol.SetIrqsFlag;
    const { msix } = this.#fn;
    const vectors = index === protocol.PciIrq.msix ? msix.vectors : 0;
    if (index >= IRQS || start + count > vectors) throw new Refusal(os.errno.EINVAL);
    if ((flags & F.trigger) !== 0 && (flags & F.dataEventfd) !== 0) {
      this.#connect(message.descriptors, start, count);
      return NOTHING;
    }
    if ((flags & F.dataEventfd) !== 0) throw new Refusal(os.errno.EINVAL);
    if ((flags & F.trigger) !== 0 && (flags & F.dataNone) !== 0 && count === 0) {
      msix.disconnectAll();
      this.#fn.msixConnected();
      return NOTHING;
    }
    for (let i = 0; i < count; i++) {
      if ((flags & F.dataBool) !== 0 && data[i] === 0) continue;
      if ((flags & F.trigger) !== 0) msix.fire(start + i);
      else msix.setMask(start + i, (flags & F.mask) !== 0);
    }
    return NOTHING;
  }

  /** One eventfd for each of `count` vectors; none at all disconnects them. */
  #connect(descriptors: number[], start: number, count: number): void {
    if (descriptors.length !== 0 && descriptors.length !== count) throw new Refusal(os.errno.EINVAL);
    const { msix } = this.#fn;
    const none = descriptors.length === 0;
    for (let i = 0; i < count; i++) {
      if (none) {
        msix.connect(start + i, null);
        continue;
      }
      msix.connect(start + i, descriptors[0]);
      // Taken over: not ours to close any more.
      descriptors.shift();
    }
    this.#fn.msixConnected();
  }

  #regionRead(payload: Uint8Array): Uint8Array {
    const { region, offset, count } = protocol.decodeRegionAccess(payload, false);
    this.#checkAccess(region, offset, count);
    if (region === CONFIG_REGION) {
      return protocol.encodeRegionReply(region, offset, count, this.#fn.readConfig(offset, count));
    }
    const data = new Uint8Array(count);
    if (!this.#memoryEnabled()) data.fill(0xff);
    else
      for (let at = 0; at < count; at += 4) put(data, at, Math.min(count, 4), this.#read(region, offset + at, count));
    return protocol.encodeRegionReply(region, offset, count, data);
  }

  #read(region: number, offset: number, count: number): number {
    return this.#fn.readBar(region, offset, Math.min(count, 4));
  }

  #regionWrite(payload: Uint8Array): Uint8Array {
    const { region, offset, count, data } = protocol.decodeRegionAccess(payload, true);
    this.#checkAccess(region, offset, count);
    if (region === CONFIG_REGION) {
      this.#fn.writeConfig(offset, data);
    } else if (this.#memoryEnabled()) {
      const width = Math.min(count, 4);
      for (let at = 0; at < count; at += 4) this.#fn.writeBar(region, offset + at, width, get(data, at, width));
    }
    return protocol.encodeRegionReply(region, offset, count);
  }

  /** A BAR is accessed in 1, 2, 4 or 8 aligned bytes (8 are two of 4); configuration space in any number. */
  #checkAccess(region: number, offset: number, count: number): void {
    const size = region < REGIONS ? this.#regionSize(region) : 0;
    if (count === 0 || !(offset + count <= size)) throw new Refusal(os.errno.EINVAL);
    if (region === CONFIG_REGION) return;
    const width = count === 8 ? 4 : count;
    if ((count !== 8 && count !== 4 && count !== 2 && count !== 1) || offset % width !== 0) {
      throw new Refusal(os.errno.EINVAL);
    }
    if (this.#fn.faults.has('region-read-error')) throw new Refusal(os.errno.EIO);
  }

  /** PCI's Memory Space bit: without it the BARs do not answer (reads are all ones). */
  #memoryEnabled(): boolean {
    return (this.#fn.config.command & PciCommand.memory) !== 0;
  }
}

const NOTHING = new Uint8Array(0);

/** The errno for an error reply; null for what ends the session. */
function errnoOf(error: unknown): number | null {
  if (error instanceof Refusal) return error.errno;
  if (error instanceof VfioError) {
    if (error.code === 'DMA_INVALID') return os.errno.EINVAL;
    if (error.code === 'DMA_EXISTS') return os.errno.EEXIST;
    return error.code === 'DMA_LIMIT' ? os.errno.ENOSPC : null;
  }
  if (error instanceof DeviceError) return os.errno.ENOMEM;
  return error instanceof SystemError ? error.errno : null;
}

/** Little-endian bytes of `value`. */
function put(data: Uint8Array, at: number, width: number, value: number): void {
  if (width === 4) writeU32(data, at, value >>> 0);
  else for (let i = 0; i < width; i++) data[at + i] = value >>> (8 * i);
}

function get(data: Uint8Array, at: number, width: number): number {
  if (width === 4) return readU32(data, at);
  return width === 2 ? data[at] | (data[at + 1] << 8) : data[at];
}

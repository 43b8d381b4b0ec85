/**
 * From a socket path to a vhost-user session on which features can be negotiated: connects to the back-end or waits for it,
 * takes ownership, and agrees on protocol features (QEMU's docs/interop/vhost-user.rst).
 */
import { SystemError, VfioError } from '../errors.ts';
import { UnixListener, UnixSocket } from '../sys/unix-socket.ts';
import { Feature, FeatureSet } from './features.ts';
import {
  decodeFeatures,
  decodeNumber,
  encodeEmpty,
  encodeFeatures,
  MAX_RINGS,
  ProtocolFeature,
  protocolError,
  Request,
  VhostFeature,
} from './vhost-user-protocol.ts';
import { VhostUserSession } from './vhost-user-session.ts';

export interface VhostUserOptions {
  /** Listen at the path and wait for the back-end to connect, as net_vhost with `client=1` does. Default false. */
  readonly server?: boolean;
  /** Milliseconds to wait for a connection. Default 5000, with `server` 30000. */
  readonly connectTimeoutMs?: number;
  /** Deadline of every message, in milliseconds. Default 5000. */
  readonly timeoutMs?: number;
  /** Use 2 MiB pages for large memory if there are any. Default false. */
  readonly hugePages?: boolean;
}

const CONNECT_TIMEOUT_MS = 5000;
const LISTEN_TIMEOUT_MS = 30_000;
const MESSAGE_TIMEOUT_MS = 5000;
/** More memory slots than anybody uses: the protocol names no limit. */
const MAX_SLOTS = 0xffff;
/** A ring is 0 for receive and 1 for transmit of each pair; the control queue is ours and needs no number. */
const MAX_PAIRS = MAX_RINGS / 2;

/** What the front-end uses when the back-end has it. */
const USED_PROTOCOL_FEATURES = FeatureSet.of(
  ProtocolFeature.MQ,
  ProtocolFeature.REPLY_ACK,
  ProtocolFeature.CONFIG,
  ProtocolFeature.RESET_DEVICE,
  ProtocolFeature.CONFIGURE_MEM_SLOTS,
  ProtocolFeature.STATUS,
);

/** A session, and what the back-end said about itself. */
export interface BackEnd {
  readonly session: VhostUserSession;
  /** All 64 feature bits, those of vhost included. */
  readonly features: FeatureSet;
  /** What it has, and what of that is in use. */
  readonly protocolFeatures: FeatureSet;
  readonly protocol: FeatureSet;
  /** Most queue pairs; 1 when it does not say. */
  readonly queuePairs: number;
  /** Memory slots; 0 when it takes a table. */
  readonly memorySlots: number;
}

/** Throws VfioError `CONNECT_FAILED`, `NOT_VHOST_USER`, or what breaks a session. Nothing stays open then. */
export async function openBackEnd(path: string, options: VhostUserOptions): Promise<BackEnd> {
  const timeoutMs = positive('timeoutMs', options.timeoutMs ?? MESSAGE_TIMEOUT_MS);
  const server = options.server === true;
  const patience = options.connectTimeoutMs ?? (server ? LISTEN_TIMEOUT_MS : CONNECT_TIMEOUT_MS);
  const connectTimeoutMs = positive('connectTimeoutMs', patience);
  const socket = server ? await accept(path, connectTimeoutMs) : connect(path, connectTimeoutMs);
  const session = new VhostUserSession(socket, timeoutMs);
  try {
    return introduce(path, session);
  } catch (error) {
    session.close();
    throw error;
  }
}

function positive(name: string, value: number): number {
  if (!(value > 0)) throw new RangeError(`${name} ${value} is not positive`);
  return value;
}

function connect(path: string, timeoutMs: number): UnixSocket {
  try {
    return UnixSocket.connect(path, performance.now() + timeoutMs);
  } catch (cause) {
    if (!(cause instanceof SystemError)) throw cause;
    throw new VfioError('CONNECT_FAILED', `cannot connect to ${path}: ${cause.message}`, {
      cause,
      hint:
        cause.hint ??
        'is the switch running, and is this the socket of its port? A port that connects itself needs ,server=1.',
    });
  }
}

/** Listens until one back-end has connected; the path is gone after that, so that there is never a second. */
async function accept(path: string, timeoutMs: number): Promise<UnixSocket> {
  let listener: UnixListener;
  try {
    listener = UnixListener.listen(path, { backlog: 1 });
  } catch (cause) {
    if (!(cause instanceof SystemError)) throw cause;
    const options = cause.hint === undefined ? { cause } : { cause, hint: cause.hint };
    throw new VfioError('CONNECT_FAILED', `cannot listen on ${path}: ${cause.message}`, options);
  }
  const { promise, resolve, reject } = withResolvers<UnixSocket>();
  const watch = listener.watch(resolve);
  const timer = setTimeout(
    () => reject(new VfioError('CONNECT_FAILED', `no back-end connected to ${path} in ${timeoutMs} ms`)),
    timeoutMs,
  );
  try {
    return await promise;
  } finally {
    clearTimeout(timer);
    watch.close();
    listener.close();
  }
}

function withResolvers<T>(): {
  promise: Promise<T>;
  resolve: (value: T) => void;
  reject: (reason: unknown) => void;
} {
  let resolve: (value: T) => void = () => {};
  let reject: (reason: unknown) => void = () => {};
  const promise = new Promise<T>((yes, no) => {
    resolve = yes;
    reject = no;
  });
  return { promise, resolve, reject };
}

function introduce(path: string, session: VhostUserSession): BackEnd {
  const features = firstAnswer(path, session);
  if (!features.has(VhostFeature.PROTOCOL_FEATURES)) {
    const none = FeatureSet.empty;
    return { session, features, protocolFeatures: none, protocol: none, queuePairs: 1, memorySlots: 0 };
  }
  const protocolFeatures = session.askFor(encodeEmpty(Request.GET_PROTOCOL_FEATURES), decodeFeatures);
  const protocol = protocolFeatures.and(USED_PROTOCOL_FEATURES);
  session.tell(encodeFeatures(Request.SET_PROTOCOL_FEATURES, protocol));
  session.acknowledged = protocol.has(ProtocolFeature.REPLY_ACK);
  const number = (request: number, max: number): number =>
    session.askFor(encodeEmpty(request), (payload) => decodeNumber(request, payload, max));
  const queuePairs = protocol.has(ProtocolFeature.MQ) ? number(Request.GET_QUEUE_NUM, 0xffffffff) : 1;
  const memorySlots = protocol.has(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    ? number(Request.GET_MAX_MEM_SLOTS, 0xffffffff)
    : 0;
  if (queuePairs === 0) throw session.fail(protocolError('the back-end has no queues'));
  if (protocol.has(ProtocolFeature.CONFIGURE_MEM_SLOTS) && memorySlots === 0) {
    throw session.fail(protocolError('the back-end has no memory slots'));
  }
  return {
    session,
    features,
    protocolFeatures,
    protocol,
    queuePairs: features.has(Feature.MQ) ? Math.min(queuePairs, MAX_PAIRS) : 1,
    memorySlots: Math.min(memorySlots, MAX_SLOTS),
  };
}

/** SET_OWNER and GET_FEATURES: who does not answer these as a back-end does, is none. */
function firstAnswer(path: string, session: VhostUserSession): FeatureSet {
  try {
    session.tell(encodeEmpty(Request.SET_OWNER));
    return session.askFor(encodeEmpty(Request.GET_FEATURES), decodeFeatures);
  } catch (cause) {
    if (!(cause instanceof VfioError)) throw cause;
    throw new VfioError('NOT_VHOST_USER', `${path} does not speak vhost-user: ${cause.message}`, { cause });
  }
}

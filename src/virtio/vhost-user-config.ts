/**
 * The configuration of a network device behind a vhost-user port (Virtio 1.4, 5.1.4): read from the back-end when CONFIG was
 * negotiated. Without it only `max_virtqueue_pairs` is there, which the front-end knows by itself.
 */
import { VirtioError } from '../errors.ts';
import { readU16, readU32 } from '../sys/little-endian.ts';
import { untilStable } from './structures.ts';
import type { ConfigReader } from './transport.ts';
import type { BackEnd } from './vhost-user-open.ts';
import { decodeConfig, encodeGetConfig, Payload, ProtocolFeature } from './vhost-user-protocol.ts';

/** `max_virtqueue_pairs` of `struct virtio_net_config` (5.1.4), and bytes of that structure. */
const MaxQueuePairs = { offset: 8, size: 2 } as const;
const CONFIG_LENGTH = 28;

/** Bytes of the configuration, however they are read. */
export interface ConfigBytes {
  readonly size: number;
  /** Throws `VirtioError` CONFIG_BOUNDS when they are not there. */
  bytes(offset: number, count: number): Uint8Array;
}

export class VhostUserConfig implements ConfigBytes {
  readonly size: number;
  readonly #backEnd: BackEnd;

  constructor(backEnd: BackEnd) {
    this.#backEnd = backEnd;
    const own = MaxQueuePairs.offset + MaxQueuePairs.size;
    this.size = backEnd.protocol.has(ProtocolFeature.CONFIG) ? CONFIG_LENGTH : own;
  }

  bytes(offset: number, count: number): Uint8Array {
    const { session, protocol, queuePairs } = this.#backEnd;
    if (offset === MaxQueuePairs.offset && count === MaxQueuePairs.size) {
      return Uint8Array.of(queuePairs & 0xff, queuePairs >>> 8);
    }
    const found =
      protocol.has(ProtocolFeature.CONFIG) && offset + count <= this.size
        ? session.askFor(
            encodeGetConfig(offset, count),
            (payload) => decodeConfig(payload, offset, count),
            0,
            Payload.configHead + count,
          )
        : null;
    if (found !== null) return found;
    throw new VirtioError('CONFIG_BOUNDS', `the back-end has no ${count} bytes of configuration at ${offset}`);
  }
}

/** Reads through `source` and remembers what it got. */
class RecordingReader implements ConfigReader {
  readonly values: number[] = [];
  readonly #source: ConfigBytes;

  constructor(source: ConfigBytes) {
    this.#source = source;
  }

  get size(): number {
    return this.#source.size;
  }

  read8(offset: number): number {
    return this.#keep(this.#source.bytes(offset, 1)[0]);
  }

  read16(offset: number): number {
    return this.#keep(readU16(this.#source.bytes(offset, 2), 0));
  }

  read32(offset: number): number {
    return this.#keep(readU32(this.#source.bytes(offset, 4), 0));
  }

  #keep(value: number): number {
    this.values.push(value);
    return value;
  }
}

/**
 * Calls `read` until it saw the same twice in a row: vhost-user has no generation counter that would tell whether the
 * configuration changed between two reads. Throws `VirtioError` CONFIG_UNSTABLE when that does not happen.
 */
export function readStable<T>(source: ConfigBytes, read: (config: ConfigReader) => T, address: string): T {
  let before: readonly number[] | null = null;
  return untilStable(address, () => {
    const reader = new RecordingReader(source);
    const value = read(reader);
    const { values } = reader;
    const isSame = before?.length === values.length && before.every((seen, i) => seen === values[i]);
    before = values;
    return isSame ? { value } : null;
  });
}

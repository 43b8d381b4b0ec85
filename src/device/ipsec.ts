/**
 * IPsec of the device: SA objects, and packets through them (Virtio 1.4, 5.1.9.7 and the crypto device's "IPsec
 * Service Operation").
 *
 * The arithmetic is `SoftwareIpsec`. Here are the rules of the standard around it: an outbound packet names an SA
 * object by id; an inbound one, which a flow filter rule has sent here, finds its SA by SPI alone among those of its
 * protocol, so two inbound SAs of one protocol and SPI are refused; objects are kept as they were set, because QUERY
 * returns them, keys included, and wiped when they go.
 */
import { IpsecError, VirtioError } from '../errors.ts';
import { SoftwareIpsec } from '../fallback/software.ts';
import { VERDICTS, Verdict } from '../fallback/verdict.ts';
import { whyNotInline } from '../ipsec/capability.ts';
import type { SecurityAssociation } from '../ipsec/sa.ts';
import { objectToSa } from '../ipsec/sa-object.ts';
import type { IpsecWire, ModeCapability, SaLimits, SaObject } from '../ipsec/wire/codec.ts';
import {
  AeadAlgorithm,
  CipherAlgorithm,
  IpsecMode,
  KEY_FIELD_SIZE,
  MacAlgorithm,
  SaDirection,
  SaOption,
} from '../ipsec/wire/numbers.ts';
import type { PacketPool } from '../packet/pool.ts';
import { AdminQualifier, AdminStatus, ResourceType } from '../virtio/admin-wire.ts';
import { type CommandResult, failed, OK_RESULT } from './command-result.ts';

/** SAs that the device takes in each direction. */
export const SA_LIMIT = 65536;
const MAX_REPLAY_WINDOW = 65536;

/** What the driver has set with DRIVER_CAP_SET. */
export interface IpsecUse {
  readonly limits: SaLimits;
  readonly modes: readonly ModeCapability[];
}

/** Link header that packets come with: Ethernet without a tag. */
const LINK_HEADER = 14;

/** One direction's objects, by id. */
class ObjectTable {
  readonly handles = new Uint32Array(SA_LIMIT);
  readonly stored = new Map<number, Uint8Array>();
  /** Which object has a protocol and SPI, and back. */
  readonly holders = new Map<string, number>();
  readonly names = new Map<number, string>();
}

export class DeviceIpsec {
  /** Packets by `Verdict`. */
  readonly protectedBy = new Float64Array(VERDICTS);
  readonly unprotectedBy = new Float64Array(VERDICTS);
  readonly #wire: IpsecWire;
  readonly #engine: SoftwareIpsec;
  readonly #outbound = new ObjectTable();
  readonly #inbound = new ObjectTable();
  /** By handle: 1 when a soft limit has been reached. */
  readonly #soft = new Uint8Array(2 * SA_LIMIT + 2);

  constructor(pool: PacketPool, wire: IpsecWire) {
    this.#wire = wire;
    this.#engine = new SoftwareIpsec(pool, {
      onEvent: (handle, event) => {
        if (event === 'soft-packets' || event === 'soft-bytes') this.#soft[handle] = 1;
      },
    });
  }

  /** What the device can do, for VIRTIO_NET_IPSEC_SA_CAP. */
  static modes(wire: IpsecWire): ModeCapability[] {
    const { esn, udpEncap, lifetime, copyDscp, decrementTtl, copyDf, ecn } = SaOption;
    const tunnel = copyDscp | decrementTtl | copyDf | ecn;
    // SHA-384 and SHA-512 keys do not fit the object.
    const macs = bits(['hmac-sha1', 'hmac-sha256', 'aes-xcbc', 'aes-cmac', 'aes-gmac'], MacAlgorithm);
    const esp = {
      ciphers: bits(['null', 'aes-cbc', 'aes-ctr', '3des-cbc'], CipherAlgorithm),
      macs,
      aeads: Number(bits(['aes-gcm', 'aes-ccm', 'chacha20-poly1305'], AeadAlgorithm)),
      maxCipherKeyLength: KEY_FIELD_SIZE,
    };
    const ah = { ciphers: bits(['null'], CipherAlgorithm), macs, aeads: 0, maxCipherKeyLength: 0 };
    const common = { maxReplayWindow: MAX_REPLAY_WINDOW, maxAuthKeyLength: KEY_FIELD_SIZE };
    const modes = [
      { mode: IpsecMode.espTunnel, options: esn | lifetime | udpEncap | tunnel, ...esp, ...common },
      { mode: IpsecMode.espTransport, options: esn | lifetime | udpEncap, ...esp, ...common },
      { mode: IpsecMode.ahTunnel, options: esn | lifetime | tunnel, ...ah, ...common },
      { mode: IpsecMode.ahTransport, options: esn | lifetime, ...ah, ...common },
    ];
    return modes.map((mode) => ({ ...mode, options: mode.options & wire.options }));
  }

  get inUse(): boolean {
    return this.#outbound.stored.size + this.#inbound.stored.size > 0;
  }

  has(type: number, id: number): boolean {
    return this.#table(type).stored.has(id);
  }

  /** The object as it was last set. */
  query(type: number, id: number): Uint8Array | undefined {
    return this.#table(type).stored.get(id);
  }

  /**
   * Creates or, when `replace`, modifies an SA. `bytes` holds at least a whole object, zeros where the driver sent
   * less.
   */
  set(type: number, id: number, bytes: Uint8Array, use: IpsecUse, replace: boolean): CommandResult {
    const outbound = type === ResourceType.NET_IPSEC_OUTB_SA;
    if (id >= Math.min(outbound ? use.limits.outbound : use.limits.inbound, SA_LIMIT)) return INVALID_FIELD;
    const table = this.#table(type);
    let object: SaObject | null = null;
    try {
      object = this.#wire.decodeSa(bytes);
      if (object.direction !== (outbound ? SaDirection.outbound : SaDirection.inbound)) return INVALID_FIELD;
      const sa = withoutInboundTunnel(objectToSa(object));
      if (whyNotInline(sa, { wire: this.#wire, ...use }) !== null) return INVALID_FIELD;
      const key = `${sa.protocol}:${sa.spi}`;
      const holder = table.holders.get(key);
      if (!outbound && holder !== undefined && holder !== id) return INVALID_FIELD;
      const handle = outbound ? 1 + 2 * id : 2 + 2 * id;
      if (replace) this.#engine.modify(handle, sa);
      else this.#engine.add(handle, sa);
      if (replace) this.#forget(table, id);
      table.handles[id] = handle;
      table.stored.set(id, bytes.slice(0, this.#wire.saObjectSize));
      if (!outbound) {
        table.holders.set(key, id);
        table.names.set(id, key);
      }
      this.#soft[handle] = replace && this.#engine.counters(handle).softExpired ? 1 : 0;
      return OK_RESULT;
    } catch (error) {
      // What a driver sent is refused; anything else is a fault of this program and goes up.
      if (error instanceof IpsecError || error instanceof VirtioError || error instanceof RangeError) {
        return INVALID_FIELD;
      }
      throw error;
    } finally {
      // The SA's keys are views of these.
      for (const secret of [object?.cipherKey, object?.authKey, object?.salt]) secret?.fill(0);
    }
  }

  destroy(type: number, id: number): void {
    const table = this.#table(type);
    this.#engine.remove(table.handles[id]);
    this.#forget(table, id);
  }

  /** Removes all SAs: reset. */
  clear(): void {
    for (const table of [this.#outbound, this.#inbound]) {
      for (const id of [...table.stored.keys()]) {
        this.#engine.remove(table.handles[id]);
        this.#forget(table, id);
      }
    }
    this.protectedBy.fill(0);
    this.unprotectedBy.fill(0);
  }

  close(): void {
    this.clear();
    this.#engine.close();
  }

  /** hot: handle of the outbound SA object `id`, for `PacketPool.sa`; 0 when there is none. */
  outboundHandle(id: number): number {
    return id < SA_LIMIT ? this.#outbound.handles[id] : 0;
  }

  /** hot: id of the SA object with `handle`. */
  resourceId(handle: number): number {
    return (handle - 1) >>> 1;
  }

  /** hot: whether the SA with `handle` has reached a soft limit. */
  softExpired(handle: number): boolean {
    return this.#soft[handle] === 1;
  }

  /** hot: see `SoftwareIpsec.protect`. */
  protect(packets: Uint32Array, n: number, verdicts: Uint8Array): void {
    this.#engine.protect(packets, n, LINK_HEADER, verdicts);
    for (let i = 0; i < n; i++) this.protectedBy[verdicts[i]]++;
  }

  /** hot: see `SoftwareIpsec.unprotect`. */
  unprotect(packets: Uint32Array, n: number, verdicts: Uint8Array): void {
    this.#engine.unprotect(packets, n, LINK_HEADER, verdicts);
    for (let i = 0; i < n; i++) this.unprotectedBy[verdicts[i]]++;
  }

  #table(type: number): ObjectTable {
    return type === ResourceType.NET_IPSEC_OUTB_SA ? this.#outbound : this.#inbound;
  }

  #forget(table: ObjectTable, id: number): void {
    table.stored.get(id)?.fill(0);
    table.stored.delete(id);
    table.handles[id] = 0;
    const name = table.names.get(id);
    if (name !== undefined) table.holders.delete(name);
    table.names.delete(id);
  }
}

/** hot: after `unprotect`, whether the packet is as it came, so that the driver may still try it in software. */
export function isUntouched(verdict: number): boolean {
  return verdict === Verdict.noSa || verdict === Verdict.expired;
}

const INVALID_FIELD = failed(AdminStatus.EINVAL, AdminQualifier.INVALID_FIELD);

function bits<N extends string>(names: readonly N[], numbers: Readonly<Record<N, number>>): bigint {
  return names.reduce((mask, name) => mask | (1n << BigInt(numbers[name])), 0n);
}

/** The tunnel header of an inbound SA is not used: the SA is found by its SPI (spec-notes, 4). */
function withoutInboundTunnel(sa: SecurityAssociation): SecurityAssociation {
  if (sa.direction === 'outbound' || sa.tunnel === undefined) return sa;
  const { tunnel: _, ...rest } = sa;
  return rest;
}

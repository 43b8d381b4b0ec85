/**
 * Inline IPsec: SA objects on the device, and what the data path must know of them (Virtio 1.4, 5.1.6.5.x "IPsec Operation").
 *
 * Order of use: the two capabilities are got and set, then objects are made. An inbound SA is an object, an entry in the table that
 * the receive queues look into, and flow filter rules; it goes in the opposite order. `obj_id` is the object's id, so that both readings of
 * the header's `resource_id` agree. Every buffer that held keys is wiped; keys are kept nowhere.
 *
 * The packets of an SA that is being destroyed may still be in a ring. Outbound: no new one enters, the queues are given time to
 * finish, and ids are used again as late as possible; the id of which a packet may still be in a ring then never is, or its packet might leave under
 * another SA. Inbound: a used-again id means its new SA only once every receive queue has been
 * seen empty; until then such packets count as not secured.
 */
import { AdminCommandError, IpsecError } from '../errors.ts';
import type { AdminQueue } from '../virtio/admin.ts';
import { AdminStatus } from '../virtio/admin-wire.ts';
import { ObjectIds } from '../virtio/object-ids.ts';
import { NOT_INLINE } from '../virtio-net/sa-table.ts';
import { driverModes, type InlineCapability, whyNotInline } from './capability.ts';
import type { InboundRules, SaRules } from './inbound-rules.ts';
import type { RedactedSaObject } from './ipsec.ts';
import type { SecurityAssociation } from './sa.ts';
import { saToObject } from './sa-object.ts';
import type { IpsecWire } from './wire/codec.ts';
import { IpsecCapability, SaObjectType } from './wire/numbers.ts';

/** The commands that inline IPsec needs: those of `AdminQueue`. */
export type InlineAdmin = Pick<
  AdminQueue,
  'deviceCapability' | 'setDriverCapability' | 'createObject' | 'modifyObject' | 'queryObject' | 'destroyObject'
>;

/** `SaTable` as the control path sees it: the arrays are put in when the limits are known. */
export interface MutableSaTable {
  resourceId: Uint32Array;
  handle: Uint32Array;
}

export interface InlineIpsecOptions {
  readonly wire: IpsecWire;
  /** Null when the device has no flow filter that leads packets to IPsec: then it takes no inbound SAs. */
  readonly rules: InboundRules | null;
  readonly table: MutableSaTable;
  /** Handles are 1 to this. */
  readonly handles: number;
  /** How many SAs of each direction the driver asks for at most. */
  readonly maxSas: number;
  /** Resolves when the transmit queues have finished what they hold now; to false when they have not, after time enough. */
  readonly quiesceTransmit: () => Promise<boolean>;
  /** Number of receive queues, whose `drained` calls are waited for. */
  readonly receiveQueues: number;
}

const NO_RULES: SaRules = [];

interface InlineSa {
  readonly id: number;
  /** Whether the id had another SA before. */
  readonly reused: boolean;
  readonly type: number;
  /** Inbound: protocol and SPI, see `identityOf`; null outbound. */
  readonly identity: number | null;
  readonly rules: SaRules;
}

/** An inbound SA whose id had another SA before. */
interface Awaited {
  readonly id: number;
  readonly handle: number;
  readonly queues: Set<number>;
}

export class InlineIpsec {
  readonly capability: InlineCapability;
  readonly #admin: InlineAdmin;
  readonly #options: InlineIpsecOptions;
  readonly #outboundIds: ObjectIds;
  readonly #inboundIds: ObjectIds;
  /** By handle. */
  readonly #sas = new Map<number, InlineSa>();
  /** Protocol and SPI of the inbound SAs on the device: the device looks nothing else up. */
  readonly #inbound = new Set<number>();
  #awaited: Awaited[] = [];

  private constructor(admin: InlineAdmin, capability: InlineCapability, options: InlineIpsecOptions) {
    this.#admin = admin;
    this.capability = capability;
    this.#options = options;
    this.#outboundIds = new ObjectIds(capability.limits.outbound);
    this.#inboundIds = new ObjectIds(capability.limits.inbound);
    options.table.resourceId = new Uint32Array(options.handles + 1).fill(NOT_INLINE);
    options.table.handle = new Uint32Array(capability.limits.inbound);
  }

  /**
   * Gets the IPsec capabilities, sets what the driver uses of them, and returns inline IPsec; null when the device, whose capability
   * ids are `ids`, has none or offers nothing in them. Throws AdminCommandError, VirtioError `MALFORMED_CAPABILITY`.
   */
  static async open(
    admin: InlineAdmin,
    ids: readonly number[],
    options: InlineIpsecOptions,
  ): Promise<InlineIpsec | null> {
    const { wire, maxSas } = options;
    if (!ids.includes(IpsecCapability.resource) || !ids.includes(IpsecCapability.sa)) return null;
    const offered = wire.decodeSaLimits(await admin.deviceCapability(IpsecCapability.resource));
    const modes = driverModes(wire.decodeModes(await admin.deviceCapability(IpsecCapability.sa)), wire);
    if (offered.inbound + offered.outbound === 0 || modes.length === 0) return null;
    const limits = { inbound: Math.min(offered.inbound, maxSas), outbound: Math.min(offered.outbound, maxSas) };
    await admin.setDriverCapability(IpsecCapability.resource, wire.encodeSaLimits(limits));
    await admin.setDriverCapability(IpsecCapability.sa, wire.encodeModes(modes));
    return new InlineIpsec(admin, { wire, limits, modes }, options);
  }

  /** Why the device cannot take `sa`, or null. */
  obstacle(sa: SecurityAssociation): string | null {
    const why = whyNotInline(sa, this.capability);
    if (why !== null) return why;
    const ids = sa.direction === 'outbound' ? this.#outboundIds : this.#inboundIds;
    if (ids.used >= ids.limit) return `all ${ids.limit} ${sa.direction} SAs of the device are in use`;
    if (sa.direction === 'outbound') return null;
    const { rules } = this.#options;
    return rules === null ? 'no flow filter of the device leads packets to IPsec' : rules.obstacle(sa);
  }

  /** Whether an inbound SA with the protocol and SPI of `sa` is on the device. */
  hasInbound(sa: Pick<SecurityAssociation, 'protocol' | 'spi'>): boolean {
    return this.#inbound.has(identityOf(sa));
  }

  /**
   * Makes the object, and for an inbound SA its rules. Throws IpsecError `SA_LIMIT`, `SA_EXISTS`; AdminCommandError; VirtioError. Then the
   * data path knows nothing of it. With `held`, what an inbound SA receives counts as not secured until `deliver`. With `elsewhere`, an
   * outbound SA is on the data path of another thread, and not on this one's.
   */
  async create(handle: number, sa: SecurityAssociation, held = false, elsewhere = false): Promise<void> {
    const outbound = sa.direction === 'outbound';
    const identity = outbound ? null : identityOf(sa);
    if (identity !== null) {
      if (this.#inbound.has(identity))
        throw new IpsecError('SA_EXISTS', 'an inbound SA with this SPI is on the device');
      this.#inbound.add(identity);
    }
    const ids = outbound ? this.#outboundIds : this.#inboundIds;
    const taken = ids.take();
    if (taken === null) {
      if (identity !== null) this.#inbound.delete(identity);
      throw new IpsecError('SA_LIMIT', `all ${ids.limit} ${sa.direction} SAs of the device are in use`);
    }
    const { id, reused } = taken;
    const type = SaObjectType[sa.direction];
    try {
      await this.#withObject(sa, id, (bytes) => this.#admin.createObject(type, id, bytes));
    } catch (error) {
      // After a timeout nobody knows whether the object exists: its id is not used again.
      if (error instanceof AdminCommandError && error.status !== AdminStatus.EEXIST) ids.give(id);
      if (identity !== null) this.#inbound.delete(identity);
      throw error;
    }
    if (outbound) {
      this.#sas.set(handle, { id, reused, type, identity, rules: NO_RULES });
      if (!elsewhere) this.#options.table.resourceId[handle] = id;
      return;
    }
    this.#sas.set(handle, { id, reused, type, identity, rules: NO_RULES });
    if (!held) this.deliver(handle);
    try {
      const rules = (await this.#options.rules?.add(sa)) ?? [];
      this.#sas.set(handle, { id, reused, type, identity, rules });
    } catch (error) {
      await this.destroy(handle).catch(() => {});
      throw error;
    }
  }

  /** The object of an SA, and whether its id had another SA before. Throws IpsecError `NO_SUCH_SA`. */
  objectOf(handle: number): { readonly id: number; readonly reused: boolean } {
    const { id, reused } = this.#get(handle);
    return { id, reused };
  }

  /** From now on packets of this thread may name the outbound SA. */
  carry(handle: number): void {
    this.#options.table.resourceId[handle] = this.#get(handle).id;
  }

  /** From now on none may. */
  leave(handle: number): void {
    this.#options.table.resourceId[handle] = NOT_INLINE;
  }

  /** Resolves when the transmit queues of this thread have finished what they hold; to false when they have not after time enough. */
  quiesce(): Promise<boolean> {
    return this.#options.quiesceTransmit();
  }

  /** From now on what the inbound SA receives counts as secured by it. */
  deliver(handle: number): void {
    const { id, reused } = this.#get(handle);
    if (reused && this.#options.receiveQueues > 0) this.#await(id, handle);
    else this.#options.table.handle[id] = handle;
  }

  /** From now on what the inbound SA receives counts as not secured. */
  silence(handle: number): void {
    this.#silence(handle, this.#get(handle).id);
  }

  #silence(handle: number, id: number): void {
    this.#awaited = this.#awaited.filter((one) => one.handle !== handle);
    if (this.#options.table.handle[id] === handle) this.#options.table.handle[id] = 0;
  }

  /**
   * Replaces the parameters of an SA; its SPI, direction and mode are the same. On failure the device keeps the old ones. Throws
   * IpsecError `NO_SUCH_SA`, AdminCommandError, VirtioError.
   */
  async modify(handle: number, sa: SecurityAssociation): Promise<void> {
    const { id, type } = this.#get(handle);
    await this.#withObject(sa, id, (bytes) => this.#admin.modifyObject(type, id, bytes));
  }

  /** What the device keeps, without keys. Throws IpsecError `NO_SUCH_SA`, AdminCommandError, VirtioError. */
  async query(handle: number): Promise<RedactedSaObject> {
    const { id, type } = this.#get(handle);
    const { wire } = this.capability;
    const bytes = await this.#admin.queryObject(type, id, wire.saObjectSize);
    try {
      const { cipherKey, authKey, salt, ...rest } = wire.decodeSa(bytes);
      for (const secret of [cipherKey, authKey, salt]) secret.fill(0);
      return { ...rest, cipherKeyLength: cipherKey.length, authKeyLength: authKey.length };
    } finally {
      bytes.fill(0);
    }
  }

  /**
   * Takes the SA off the data path at once and destroys its object. Does nothing for a handle without SA. With `retireId` the id is not
   * used again: somebody may still take it for the SA. Resolves to that id if there is nobody else who may, for `reuse`; else to null.
   */
  async destroy(handle: number, retireId = false): Promise<number | null> {
    const sa = this.#sas.get(handle);
    if (sa === undefined) return null;
    this.#sas.delete(handle);
    const { table, rules, quiesceTransmit } = this.#options;
    const outbound = sa.type === SaObjectType.outbound;
    let isNamedHere = false;
    if (outbound) {
      table.resourceId[handle] = NOT_INLINE;
      isNamedHere = !(await quiesceTransmit());
    } else {
      this.#silence(handle, sa.id);
      await rules?.remove(sa.rules);
    }
    try {
      await this.#admin.destroyObject(sa.type, sa.id);
    } catch (error) {
      if (!(error instanceof AdminCommandError && error.status === AdminStatus.ENXIO)) throw error;
    }
    if (!isNamedHere && !retireId) (outbound ? this.#outboundIds : this.#inboundIds).give(sa.id);
    if (sa.identity !== null) this.#inbound.delete(sa.identity);
    return retireId && !isNamedHere ? sa.id : null;
  }

  /** Nobody takes the id of an outbound object, which `destroy` has kept, for the SA of before any more. */
  reuse(id: number): void {
    this.#outboundIds.give(id);
  }

  /** Whether `drained` is waited for. */
  get awaitsDrain(): boolean {
    return this.#awaited.length > 0;
  }

  /** Receive queue `queue` was seen empty: what arrives from now on was processed with the SAs of now. */
  drained(queue: number): void {
    for (const one of this.#awaited) {
      one.queues.delete(queue);
      if (one.queues.size === 0) this.#options.table.handle[one.id] = one.handle;
    }
    this.#awaited = this.#awaited.filter((one) => one.queues.size > 0);
  }

  #await(id: number, handle: number): void {
    const queues = new Set(Array.from({ length: this.#options.receiveQueues }, (_, i) => i));
    this.#awaited.push({ id, handle, queues });
  }

  #get(handle: number): InlineSa {
    const sa = this.#sas.get(handle);
    if (sa === undefined) throw new IpsecError('NO_SUCH_SA', `no SA of the device has handle ${handle}`);
    return sa;
  }

  /** Encodes the object, sends it, and wipes it as soon as the command has been copied to where the device reads it. */
  async #withObject(sa: SecurityAssociation, id: number, send: (bytes: Uint8Array) => Promise<void>): Promise<void> {
    const { wire } = this.capability;
    const bytes = new Uint8Array(wire.saObjectSize);
    let sent: Promise<void>;
    try {
      wire.encodeSa(saToObject(sa, id, wire.hasInitialSequence), bytes);
      sent = send(bytes);
    } finally {
      bytes.fill(0);
    }
    await sent;
  }
}

/** Protocol and SPI in one number. */
function identityOf(sa: Pick<SecurityAssociation, 'protocol' | 'spi'>): number {
  return sa.protocol === 'esp' ? sa.spi : 2 ** 32 + sa.spi;
}

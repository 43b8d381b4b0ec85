/**
 * An ESP action in the shape of the RDMA verbs (`ibv_create_flow_action_esp(3)`): parameters for encryption or decryption that any number of
 * flows refer to (`flow-table.ts`).
 *
 * Full offload is an SA: on the device when it can express it, else in software, as `Ipsec.addSa` decides. Inline crypto is not a thing that
 * virtio has: `fallback/inline-crypto.ts` does it.
 *
 * `modify` is atomic as the manual page promises. If it fails, the action is what it was. If it succeeds, there is one point, between two
 * bursts, from which on all flows use the new parameters: on a device within one SA object, the device's own point; else one assignment.
 * Parameters that are not given stay, so the action keeps its key until it is destroyed or the NIC ends. A
 * nonce is never repeated: what would, such as another limit for an SA on the device with the key that it has sent with, is refused.
 */
import { IpsecError } from '../../errors.ts';
import { InlineCrypto } from '../../fallback/inline-crypto.ts';
import type { PacketPool } from '../../packet/pool.ts';
import type { Ipsec, KeyReservation, SaHandle } from '../ipsec.ts';
import type { Placement } from '../placement.ts';
import type { SecurityAssociationInput } from '../validate.ts';
import {
  type EspParameters,
  type FlowActionEspAttributes,
  type FlowActionEspModify,
  readAttributes,
  toSa,
} from './attributes.ts';
import { EspMask } from './numbers.ts';

/** What is used of a `Nic`. */
export interface VerbsNic {
  readonly ipsec: Ipsec;
  readonly packets: PacketPool;
}

/** A flow, as far as its action knows it. */
export interface FlowUser {
  /** Throws IpsecError when a packet that the flow matches could not belong to the action any more. */
  check(next: EspParameters): void;
  /** The action has another handle: a single assignment. */
  switchOver(): void;
}

/** The inline crypto of a pool, and how many actions use it. */
interface SharedCrypto {
  readonly crypto: InlineCrypto;
  users: number;
}

const cryptoOf = new WeakMap<PacketPool, SharedCrypto>();

/** What runs an action: an SA, or a context of inline crypto. */
type Runner =
  | { readonly kind: 'sa'; readonly sa: SaHandle }
  | { readonly kind: 'crypto'; readonly context: number; readonly key: KeyReservation };

/**
 * Makes an action. Throws IpsecError `FLOW_ACTION_ATTRIBUTE` with the path of the field; for full offload what `Ipsec.addSa` throws; `NONCE_REUSE`
 * when an encrypting SA or action has the key, or had it and the first IV is not beyond what was used.
 */
export async function createFlowActionEsp(nic: VerbsNic, attributes: FlowActionEspAttributes): Promise<FlowActionEsp> {
  const parameters = readAttributes(attributes, null);
  try {
    if (!parameters.fullOffload) return FlowActionEsp.start(nic, parameters, null);
    return FlowActionEsp.start(nic, parameters, await nic.ipsec.addSa(toSa(parameters)));
  } catch (error) {
    wipe(parameters);
    throw error;
  }
}

export class FlowActionEsp {
  readonly #nic: VerbsNic;
  readonly #flows = new Set<FlowUser>();
  #parameters: EspParameters;
  #runner: Runner;
  #modifying: Promise<void> = Promise.resolve();
  #destroyed = false;
  readonly #forgetNic: () => void;

  private constructor(nic: VerbsNic, parameters: EspParameters, sa: SaHandle | null) {
    this.#nic = nic;
    this.#parameters = parameters;
    this.#runner = sa === null ? this.#makeCrypto(parameters) : { kind: 'sa', sa };
    this.#forgetNic = nic.ipsec.onClose(() => this.#nicEnded());
  }

  /** Not to be called: use `createFlowActionEsp`. */
  static start(nic: VerbsNic, parameters: EspParameters, sa: SaHandle | null): FlowActionEsp {
    return new FlowActionEsp(nic, parameters, sa);
  }

  get fullOffload(): boolean {
    return this.#parameters.fullOffload;
  }

  get encrypts(): boolean {
    return this.#parameters.encrypt;
  }

  get transport(): boolean {
    return this.#parameters.transport;
  }

  /** The SPI of an action in full offload; 0 for inline crypto, where packets have it. */
  get spi(): number {
    return this.#parameters.spi;
  }

  /** The SA of an action in full offload: for its placement, counters and events. A modify may make it another. Null for inline crypto. */
  get sa(): SaHandle | null {
    return this.#runner.kind === 'sa' ? this.#runner.sa : null;
  }

  /** Where the action runs, and why. */
  get placement(): Placement {
    const { sa } = this;
    return sa?.placement ?? { where: 'software', because: 'virtio has no inline crypto' };
  }

  /** Number of the SA, or of the context of inline crypto. */
  get handle(): number {
    return this.#runner.kind === 'sa' ? this.#runner.sa.handle : this.#runner.context;
  }

  /** How many flows refer to the action. */
  get flows(): number {
    return this.#flows.size;
  }

  /** The engine of inline crypto for the packets of the NIC. Null when no action needs it. */
  static cryptoOf(pool: PacketPool): InlineCrypto | null {
    return cryptoOf.get(pool)?.crypto ?? null;
  }

  /** A flow begins to refer to the action. Throws IpsecError `FLOW_ACTION_DESTROYED`, and what `flow.check` throws. */
  attach(flow: FlowUser): void {
    this.#checkAlive();
    flow.check(this.#parameters);
    this.#flows.add(flow);
  }

  detach(flow: FlowUser): void {
    this.#flows.delete(flow);
  }

  /**
   * Changes the components that are given. In full offload with the key that it has, the action's sequence numbers and IVs go on, and cannot be set; with
   * a new key they are what is given, or begin anew. In inline crypto what can change is the key, and with `EspMask.esn` and
   * the flag ESN_NEW_WINDOW the state of extended sequence numbers, once every 2^31 packets. Throws IpsecError
   * `FLOW_ACTION_ATTRIBUTE`, `FLOW_ACTION_DESTROYED`, `FLOW_MISMATCH`; what `SaHandle.modify`, `SaHandle.move` and `Ipsec.addSa` throw.
   */
  modify(change: FlowActionEspModify): Promise<void> {
    const done = this.#modifying.then(() => this.#modify(change));
    this.#modifying = done.catch(() => {});
    return done;
  }

  async #modify(change: FlowActionEspModify): Promise<void> {
    this.#checkAlive();
    const before = this.#parameters;
    let next = readAttributes(change, before);
    try {
      const sameKey = next.key.every((byte, i) => byte === before.key[i]) && next.key.length === before.key.length;
      const rekeyed = !sameKey || next.salt.some((byte, i) => byte !== before.salt[i]);
      if (rekeyed) next = { ...next, ...restarted(change, before) };
      else if (before.fullOffload) refuseSequence(next, before);
      for (const flow of this.#flows) flow.check(next);
      const old = before.fullOffload ? await this.#modifySa(next, before, rekeyed) : this.#modifyCrypto(next, rekeyed);
      this.#parameters = next;
      for (const flow of this.#flows) flow.switchOver();
      wipe(before);
      // It is off every flow; what the device says to its end changes nothing.
      if (old !== null) await this.#end(old).catch(() => {});
    } catch (error) {
      if (this.#parameters !== next) wipe(next);
      throw error;
    }
  }

  /** Gives the runner that is not needed any more, if it is another one now. */
  async #modifySa(next: EspParameters, before: EspParameters, rekeyed: boolean): Promise<Runner | null> {
    const runner = this.#runner;
    if (runner.kind !== 'sa') return null;
    const sa = toSa(next);
    if (next.spi === before.spi && next.transport === before.transport) {
      await modifyInPlace(runner.sa, sa, rekeyed);
      return null;
    }
    const made = await this.#nic.ipsec.addSa(sa);
    try {
      this.#checkAlive();
      // Flows may have come meanwhile.
      for (const flow of this.#flows) flow.check(next);
    } catch (error) {
      await made.remove();
      throw error;
    }
    this.#runner = { kind: 'sa', sa: made };
    return runner;
  }

  #modifyCrypto(next: EspParameters, rekeyed: boolean): Runner | null {
    const runner = this.#runner;
    if (runner.kind !== 'crypto') return null;
    if (rekeyed || next.icvLen !== this.#parameters.icvLen) {
      // The other context of a key that stays would begin its IVs anew.
      if (!rekeyed && next.encrypt) {
        const hint = 'Give the action a new key.';
        throw new IpsecError('NONCE_REUSE', 'the action has used IVs with this key and salt', { hint });
      }
      this.#runner = this.#makeCrypto(next);
      return runner;
    }
    if (next.esn !== null) {
      FlowActionEsp.cryptoOf(this.#nic.packets)?.setEsn(runner.context, { esn: next.esn, newWindow: next.newWindow });
    }
    return null;
  }

  #makeCrypto(parameters: EspParameters): Runner {
    const { packets, ipsec } = this.#nic;
    const { encrypt, key, salt, icvLen, esn, newWindow } = parameters;
    const aead = { name: 'aes-gcm', key, salt, icvLength: icvLen } as const;
    const direction = encrypt ? 'outbound' : 'inbound';
    const reservation = ipsec.reserveKey({ direction, mode: 'transport', spi: 1, aead });
    let shared = cryptoOf.get(packets);
    try {
      shared ??= { crypto: new InlineCrypto(packets), users: 0 };
      cryptoOf.set(packets, shared);
      const context = shared.crypto.create({
        direction: encrypt ? 'encrypt' : 'decrypt',
        key,
        salt,
        icvLength: icvLen,
        extended: esn === null ? null : { esn, newWindow },
      });
      shared.users++;
      return { kind: 'crypto', context, key: reservation };
    } catch (error) {
      reservation.release(0n);
      if (shared !== undefined) closeUnused(packets, shared);
      throw error;
    }
  }

  /**
   * Ends the action and wipes its key. Throws IpsecError `FLOW_ACTION_IN_USE` while flows refer to it; what `SaHandle.remove` throws, and then it
   * is over all the same. Idempotent.
   */
  async destroy(): Promise<void> {
    if (this.#destroyed) return;
    if (this.#flows.size > 0) {
      throw new IpsecError('FLOW_ACTION_IN_USE', `${this.#flows.size} flows refer to the action`);
    }
    this.#destroyed = true;
    await this.#modifying;
    this.#forgetNic();
    wipe(this.#parameters);
    await this.#end(this.#runner);
  }

  async #end(runner: Runner): Promise<void> {
    if (runner.kind === 'sa') {
      await runner.sa.remove();
      return;
    }
    const { packets } = this.#nic;
    const shared = cryptoOf.get(packets);
    if (shared === undefined) return;
    const { iv } = shared.crypto.counters(runner.context);
    shared.crypto.destroy(runner.context);
    runner.key.release(iv);
    shared.users--;
    closeUnused(packets, shared);
  }

  /** Keys end with the NIC, whose packets are no more. */
  #nicEnded(): void {
    this.#destroyed = true;
    wipe(this.#parameters);
    const runner = this.#runner;
    if (runner.kind === 'crypto') void this.#end(runner);
  }

  #checkAlive(): void {
    if (this.#destroyed) throw new IpsecError('FLOW_ACTION_DESTROYED', 'the action was destroyed');
  }
}

function closeUnused(pool: PacketPool, shared: SharedCrypto): void {
  if (shared.users > 0) return;
  cryptoOf.delete(pool);
  shared.crypto.close();
}

/** With a new key, the numbers of the old one do not stay; in inline crypto they are the caller's. */
function restarted(
  { espAttr, keymat, compMask = 0 }: FlowActionEspModify,
  before: EspParameters,
): Partial<EspParameters> {
  const anew = before.fullOffload && before.esn !== null && (compMask & EspMask.esn) === 0;
  return { seq: espAttr?.seq ?? 0, iv: keymat?.iv ?? null, ...(anew ? { esn: 0 } : {}) };
}

/** A sequence number or IV that is set back is used twice; one that is set forward, the device cannot be told of. */
function refuseSequence(next: EspParameters, before: EspParameters): void {
  const changed = next.seq !== before.seq ? 'espAttr.seq' : next.esn !== before.esn ? 'esn' : null;
  const path = changed ?? (next.iv !== before.iv ? 'keymat.iv' : null);
  if (path === null) return;
  const what = `${path} of an action in full offload can change only together with its key`;
  throw new IpsecError('FLOW_ACTION_ATTRIBUTE', what, { path });
}

/** Where the SA is; with a new key elsewhere, when the device cannot express what it is to be. */
async function modifyInPlace(handle: SaHandle, sa: SecurityAssociationInput, rekeyed: boolean): Promise<void> {
  try {
    await handle.modify(sa);
  } catch (error) {
    if (!rekeyed || !(error instanceof IpsecError && error.code === 'NOT_OFFLOADABLE')) throw error;
    await handle.move('software', sa);
  }
}

function wipe({ key, salt }: EspParameters): void {
  key.wipe();
  salt.wipe();
}

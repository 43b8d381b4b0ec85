/**
 * Which frames are for the driver (Virtio 1.4, 5.1.9.5.1 to 5.1.9.5.3): by destination address with CTRL_RX, by VLAN tag with
 * CTRL_VLAN. Without these features the driver cannot say, and gets everything.
 *
 * A table of more addresses than are kept counts as all-unicast or all-multicast, which the standard allows.
 */
import { Ethernet, EtherType, Vlan } from '../packet/fields.ts';
import { Feature, type FeatureSet } from '../virtio/features.ts';
import { type MacTables, RxCommand, VLAN_IDS } from '../virtio-net/control-wire.ts';
import type { FaultSet } from './faults.ts';

const MAC_LENGTH = 6;
/** Addresses of each table that are kept. */
const TABLE_MAX = 64;
const GROUP = 1;
const VLAN_MASK = VLAN_IDS - 1;

export class ReceiveFilter {
  readonly #mac = new Uint8Array(MAC_LENGTH);
  /** By `RxCommand`. */
  readonly #modes = new Uint8Array(Object.keys(RxCommand).length);
  readonly #tables = [new Uint8Array(TABLE_MAX * MAC_LENGTH), new Uint8Array(TABLE_MAX * MAC_LENGTH)] as const;
  /** Addresses in the table of unicast and of multicast ones; -1 when there were too many. */
  readonly #entries = new Int32Array(2);
  readonly #vlans = new Uint8Array(VLAN_IDS);
  #byMac = false;
  #byVlan = false;
  readonly #faults: FaultSet;

  constructor(faults: FaultSet) {
    this.#faults = faults;
  }

  /** As after a reset, for what was negotiated. */
  start(features: FeatureSet, mac: Uint8Array): void {
    const faults = this.#faults;
    this.#byMac = features.has(Feature.CTRL_RX) && !faults.has('rx-filter-open');
    this.#byVlan = (features.has(Feature.CTRL_VLAN) || faults.has('vlan-always')) && !faults.has('rx-filter-open');
    this.#modes.fill(0);
    if (!faults.has('mac-table-kept')) this.#entries.fill(0);
    this.#vlans.fill(0);
    this.#mac.set(mac);
  }

  set mac(mac: Uint8Array) {
    this.#mac.set(mac);
  }

  setMode(command: number, on: boolean): void {
    this.#modes[command] = on ? 1 : 0;
  }

  setTables(tables: MacTables): void {
    for (const [i, macs] of [tables.unicast, tables.multicast].entries()) {
      this.#entries[i] = macs.length > TABLE_MAX ? -1 : macs.length;
      for (const [k, mac] of macs.slice(0, TABLE_MAX).entries()) this.#tables[i].set(mac, k * MAC_LENGTH);
    }
  }

  setVlan(id: number, on: boolean): void {
    this.#vlans[id] = on ? 1 : 0;
  }

  /** hot: whether the frame at `at`, which has at least 18 readable bytes, is for the driver. */
  accepts(u8: Uint8Array, at: number): boolean {
    if (!this.#byMac && !this.#byVlan) return true;
    if (this.#byVlan && ((u8[at + Ethernet.type] << 8) | u8[at + Ethernet.type + 1]) === EtherType.vlan) {
      const tag = at + Ethernet.type + Vlan.tci;
      if (this.#vlans[((u8[tag] << 8) | u8[tag + 1]) & VLAN_MASK] === 0) return false;
    }
    return !this.#byMac || this.#acceptsMac(u8, at);
  }

  /** hot: */
  #acceptsMac(u8: Uint8Array, at: number): boolean {
    const modes = this.#modes;
    if (modes[RxCommand.PROMISC] !== 0) return true;
    if ((u8[at] & GROUP) === 0) {
      if (modes[RxCommand.NOUNI] !== 0) return false;
      return modes[RxCommand.ALLUNI] !== 0 || isSame(u8, at, this.#mac, 0) || this.#isListed(u8, at, 0);
    }
    if (isBroadcast(u8, at)) return modes[RxCommand.NOBCAST] === 0;
    if (modes[RxCommand.NOMULTI] !== 0) return false;
    return modes[RxCommand.ALLMULTI] !== 0 || this.#isListed(u8, at, 1);
  }

  /** hot: */
  #isListed(u8: Uint8Array, at: number, which: 0 | 1): boolean {
    const entries = this.#entries[which];
    if (entries < 0) return true;
    for (let i = 0; i < entries; i++) if (isSame(u8, at, this.#tables[which], i * MAC_LENGTH)) return true;
    return false;
  }
}

/** hot: */
function isSame(a: Uint8Array, at: number, b: Uint8Array, from: number): boolean {
  for (let i = 0; i < MAC_LENGTH; i++) if (a[at + i] !== b[from + i]) return false;
  return true;
}

/** hot: */
function isBroadcast(u8: Uint8Array, at: number): boolean {
  for (let i = 0; i < MAC_LENGTH; i++) if (u8[at + i] !== 0xff) return false;
  return true;
}

/**
 * How the faults of `faults.ts` that concern the control virtqueue are made: each is a rule around the execution of a
 * command.
 *
 * A rule gets the command and `next`, which executes it, or another, as the device would.
 */
import {
  CoalescingCommand,
  ControlClass,
  ControlField,
  decodeRssConfig,
  encodeRssConfig,
  getLe,
  MqCommand,
  type RssConfig,
  RxCommand,
  StatsCommand,
} from '../virtio-net/control-wire.ts';
import type { FaultName, FaultSet } from './faults.ts';

/** What a command comes to: `ack`, and the result of one that succeeded. */
export interface ControlAnswer {
  readonly ok: boolean;
  readonly result: Uint8Array;
}

export type ControlExecute = (command: Uint8Array) => ControlAnswer;
type Rule = (command: Uint8Array, next: ControlExecute) => ControlAnswer;

const NOTHING = new Uint8Array(0);
const DONE: ControlAnswer = { ok: true, result: NOTHING };
const REFUSED: ControlAnswer = { ok: false, result: NOTHING };
/** Classes of inner header hashes and of RSS contexts (5.1.9.4.3, 5.1.9.5.8), and what a query of the latter gives. */
const HASH_TUNNEL_CLASS = 7;
const RSS_CONTEXT_CLASS = 9;
const NO_CONTEXTS = new Uint8Array(2);
/** Fields of `struct virtio_net_ctrl_coal_vq` behind class and command, and of a reply header of statistics. */
const Coal = { reserved: 2 } as const;
const ReplyHeader = { size: 6 } as const;
/** More bytes than a driver has asked for. */
const MUCH = 2048;

function is(command: Uint8Array, classNumber: number, ...commands: readonly number[]): boolean {
  const isClass = command[ControlField.class] === classNumber;
  return isClass && (commands.length === 0 || commands.includes(command[ControlField.command]));
}

/** Which receive modes are on; noted for each command that passes. */
function modes(): { note(command: Uint8Array): void; on(...which: readonly number[]): boolean } {
  const on = new Set<number>();
  return {
    note: (command) => {
      if (command[ControlField.data] === 1) on.add(command[ControlField.command]);
      else on.delete(command[ControlField.command]);
    },
    on: (...which) => which.some((mode) => on.has(mode)),
  };
}

/** A command RSS_CONFIG with another configuration. */
function rss(change: (config: RssConfig) => RssConfig): () => Rule {
  return () => (command, next) => {
    const config = is(command, ControlClass.MQ, MqCommand.RSS_CONFIG)
      ? decodeRssConfig(command.subarray(ControlField.data))
      : null;
    if (config === null) return next(command);
    return next(Uint8Array.of(...command.subarray(0, ControlField.data), ...encodeRssConfig(change(config))));
  };
}

const { PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST } = RxCommand;

/** Makes the rule of each fault, with a state of its own. */
const RULES: Partial<Record<FaultName, () => Rule>> = {
  'ctrl-refused': () => () => REFUSED,
  'ctrl-ignored': () => () => DONE,
  'rx-promisc-weak': () => {
    const known = modes();
    return (command, next) => {
      if (!is(command, ControlClass.RX)) return next(command);
      const isWeak = is(command, ControlClass.RX, PROMISC) && known.on(NOMULTI, NOUNI, NOBCAST);
      known.note(command);
      return isWeak ? DONE : next(command);
    };
  },
  'rx-all-wins': () => {
    const known = modes();
    return (command, next) => {
      if (!is(command, ControlClass.RX)) return next(command);
      known.note(command);
      return is(command, ControlClass.RX, NOMULTI, NOUNI, NOBCAST) && known.on(ALLMULTI, ALLUNI) ? DONE : next(command);
    };
  },
  'rx-nomulti-broadcast': () => (command, next) => {
    if (is(command, ControlClass.RX, NOMULTI)) {
      const other = command.slice();
      other[ControlField.command] = NOBCAST;
      next(other);
    }
    return next(command);
  },
  'mq-never-fewer': () => {
    let most = 0;
    return (command, next) => {
      if (!is(command, ControlClass.MQ, MqCommand.VQ_PAIRS_SET)) return next(command);
      const pairs = getLe(command, ControlField.data, 2);
      if (pairs < most) return DONE;
      most = pairs;
      return next(command);
    };
  },
  'rss-table-zero': rss((config) => ({ ...config, indirectionTable: config.indirectionTable.map(() => 0) })),
  'rss-unclassified-ignored': rss((config) => ({ ...config, unclassifiedQueue: 0 })),
  'rss-contexts-none': () => (command, next) =>
    is(command, RSS_CONTEXT_CLASS, 0) ? { ok: true, result: NO_CONTEXTS } : next(command),
  'hash-tunnel-any': () => (command, next) => (is(command, HASH_TUNNEL_CLASS) ? DONE : next(command)),
  'announce-sticks': () => (command, next) => (is(command, ControlClass.ANNOUNCE) ? DONE : next(command)),
  'coal-reserved-checked': () => (command, next) => {
    const isChecked = is(command, ControlClass.NOTF_COAL, CoalescingCommand.VQ_SET, CoalescingCommand.VQ_GET);
    return isChecked && getLe(command, ControlField.data + Coal.reserved, 2) !== 0 ? REFUSED : next(command);
  },
  'coal-any-queue': () => (command, next) => {
    const answer = next(command);
    const isOne = is(command, ControlClass.NOTF_COAL, CoalescingCommand.VQ_SET, CoalescingCommand.VQ_GET);
    return isOne && !answer.ok ? DONE : answer;
  },
  'stats-lenient': () => (command, next) => {
    const answer = next(command);
    return is(command, ControlClass.STATS, StatsCommand.GET) && !answer.ok ? DONE : answer;
  },
  'stats-header-wrong': () => (command, next) => {
    const answer = next(command);
    if (!is(command, ControlClass.STATS, StatsCommand.GET) || answer.result.length === 0) return answer;
    const result = answer.result.slice();
    result[ReplyHeader.size] += 8;
    return { ...answer, result };
  },
  'stats-fills-all': () => (command, next) => {
    const answer = next(command);
    if (!is(command, ControlClass.STATS, StatsCommand.GET) || !answer.ok) return answer;
    return { ...answer, result: Uint8Array.of(...answer.result, ...new Uint8Array(MUCH)) };
  },
};

/** `execute` with the rules of `faults` around it; `execute` itself when there are none. */
export function withControlFaults(execute: ControlExecute, faults: FaultSet): ControlExecute {
  let chain = execute;
  for (const name of faults) {
    const rule = RULES[name]?.();
    if (rule === undefined) continue;
    const next = chain;
    chain = (command) => rule(command, next);
  }
  return chain;
}
